"""One rank of a gloo group, started by test_distributed.py: runs every scenario and saves what its parameters became.

python ranks.py RANK WORLD_SIZE STORE_FILE OUTPUT_FOLDER
"""

import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import kd_core.distributed
from kd_core.losses import DKDLoss
from kd_core.optim import StreamAdamW, StreamSGD, deepkd_sgd
from kd_core.optim.gsnr import AutoMomenta
from kd_core.streams import backward_streams

THREE = {"tog": 0.9, "tcg": 0.8, "ncg": 0.95}
EQUAL = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}
BUILDS = {
    "two sets": lambda params: deepkd_sgd(params, 0.05, weight_decay=0.01),
    "three sets": lambda params: StreamSGD(params, 0.05, THREE, weight_decay=0.01, nesterov=True),
    "one set": lambda params: StreamSGD(params, 0.05, EQUAL, weight_decay=0.01),
    "adamw": lambda params: StreamAdamW(params, 0.01, THREE),
    "torch's sgd": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
}
ROWS = 24  # divides by 2 and by 3, and by micro-batches of each


class Net(nn.Module):
    """A backbone, a classifier, a head that the task alone reaches, and a parameter that nothing reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone = nn.Conv2d(3, 8, 3)
        self.classifier, self.task_head = nn.Linear(8, 5), nn.Linear(8, 2)
        self.never_reached = nn.Parameter(torch.ones(3))
        self.double().to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = torch.tanh(self.backbone(images)).mean((2, 3))
        return self.classifier(features), self.task_head(features)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, teacher logits and targets of the whole batch, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(ROWS, 3, 6, 6, generator=generator, dtype=torch.float64)
    teacher_logits = torch.randn(ROWS, 5, generator=generator, dtype=torch.float64)
    return images, teacher_logits, torch.randint(5, (ROWS,), generator=generator)


def streams(model: nn.Module, step: int, rows: slice) -> dict[str, Tensor | None]:
    images, teacher_logits, target = (t[rows] for t in batch(step))
    logits, task = model(images)
    terms = DKDLoss()(logits, teacher_logits, target)
    tog = nn.functional.cross_entropy(logits, target) + task.square().mean()
    return {"tog": tog, "tcg": terms["tckd"], "ncg": terms["nckd"]}


def share(rank: int, world: int, part: int = 0, parts: int = 1) -> slice:
    """The rows of part `part` of `parts` of this rank's share of the batch."""
    size = ROWS // world // parts
    start = rank * (ROWS // world) + part * size
    return slice(start, start + size)


def train(
    build: Callable, rank: int, world: int, parts: int = 1, ddp: bool = True, always_sync: bool = False
) -> nn.Module:
    """Six steps on equal shares of the batch, each in `parts` micro-batches that together make its mean."""
    model = Net()
    optimizer = build(model.parameters())
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if ddp else model
    for step in range(6):
        optimizer.zero_grad()
        for part in range(parts):
            with wrapped.no_sync() if ddp else nullcontext():
                losses = streams(wrapped, step, share(rank, world, part, parts))
            losses = {name: loss / parts for name, loss in losses.items()}
            backward_streams(losses, optimizer, sync=always_sync or part == parts - 1)
        if hasattr(optimizer, "clip_grad_norm_"):
            optimizer.clip_grad_norm_(2.0)
        optimizer.step()
    return model


def uneven(rank: int, world: int) -> nn.Module:
    """Rank r has 2 r + 1 rows, and in step 2 rank 0 has no batch at all."""
    model = Net()
    optimizer = deepkd_sgd(model.parameters(), 0.05, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        empty = step == 2 and rank == 0
        backward_streams({} if empty else streams(model, step, slice(rank, 3 * rank + 1)), optimizer)
        optimizer.step()
    return model


def without_foreground(rank: int, world: int) -> nn.Module:
    """Rank 0 never has the distillation streams; rank 1 lacks the task in step 1; nobody has ncg in step 3."""
    model = Net()
    optimizer = StreamSGD(model.parameters(), 0.05, THREE, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        losses = streams(model, step, share(rank, world))
        if rank == 0:
            losses = {"tog": losses["tog"]}
        if rank == 1 and step == 1:
            losses["tog"] = None
        if step == 3:
            losses.pop("ncg", None)
        backward_streams(losses, optimizer)
        optimizer.step()
    return model


def infinity(rank: int, world: int) -> tuple[nn.Module, list[float], list[bool]]:
    """fp16's scaler, with an infinity in one stream of the last rank in step 1."""
    model = Net().float()
    optimizer = deepkd_sgd(model.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    scales, moved = [], []
    for step in range(3):
        optimizer.zero_grad()
        images, teacher_logits, target = (t[share(rank, world)] for t in batch(step))
        logits, task = model(images.float())
        terms = DKDLoss()(logits, teacher_logits.float(), target)
        if step == 1 and rank == world - 1:
            terms["tckd"] = terms["tckd"] * float("inf")
        backward_streams({"tog": task.square().mean(), "tcg": terms["tckd"], "ncg": terms["nckd"]}, optimizer, scaler)
        before = model.classifier.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(before, model.classifier.weight))
    return model, scales, moved


def auto_momenta(rank: int, world: int) -> dict[str, float]:
    """Momenta that every rank sets by itself, from gradients that it alone has seen, and from all the others'."""
    model = Net()
    optimizer = StreamSGD(model.parameters(), 0.01, EQUAL)
    auto = AutoMomenta(optimizer, model.named_parameters(), warmup=12, every=2)
    for step in range(14):
        losses = streams(model, step, slice(rank, 3 * rank + 1))
        auto.observe(losses, step)
        optimizer.zero_grad()
        backward_streams(losses, optimizer)
        optimizer.step()
    return dict(optimizer.param_groups[0]["momenta"])


def order_and_bytes() -> tuple[list[str], int, int]:
    """What happens in one call: backward passes, reductions by their bytes, and memory that is not freed by then."""
    model, events, gradients = Net(), [], []
    model.classifier.register_full_backward_hook(lambda *_: events.append("backward"))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: gradients.append(weakref.ref(p.grad)))
    optimizer = deepkd_sgd(model.parameters(), 0.05)
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *arguments, **options):
        if tensor.dtype != torch.uint8:
            kept = sum(gradient() is not None for gradient in gradients)
            events.append(f"reduce {tensor.nbytes}" + (f", {kept} gradients beside the buckets" if kept else ""))
        return all_reduce(tensor, *arguments, **options)

    dist.all_reduce = counted
    backward_streams(streams(model, 0, slice(0, 4)), optimizer)
    dist.all_reduce = all_reduce
    return events, optimizer.gradients.bytes_sent, sum(p.nbytes for p in model.parameters())


def bytes_sent(accumulate: int = 1) -> dict[str, tuple[int, int]]:
    """(bytes sent in one step, bytes of the trainable parameters) by the number of sets, with a frozen backbone."""
    counted = {}
    for name in ("one set", "two sets", "three sets"):
        model = Net()
        model.backbone.requires_grad_(False)
        optimizer = BUILDS[name](model.parameters())
        for part in range(accumulate):
            backward_streams(streams(model, 0, slice(0, 4)), optimizer, sync=part == accumulate - 1)
        trainable = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        counted[name] = (optimizer.gradients.bytes_sent, trainable)
    return counted


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def main(rank: int, world: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=120)  # a rank that hangs fails
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=limit)
    results: dict[str, object] = {name: state(train(build, rank, world)) for name, build in BUILDS.items()}
    results["plain module"] = state(train(BUILDS["two sets"], rank, world, ddp=False))
    for parts in (2, 4):
        results[f"{parts} micro-batches"] = state(train(BUILDS["two sets"], rank, world, parts))
    results["2 micro-batches, both reduced"] = state(train(BUILDS["two sets"], rank, world, 2, always_sync=True))
    results["uneven"] = state(uneven(rank, world))
    results["without foreground"] = state(without_foreground(rank, world))
    model, scales, moved = infinity(rank, world)
    results["infinity"], results["scales"], results["moved"] = state(model), scales, moved
    results["auto momenta"] = auto_momenta(rank, world)
    results["events"], results["bytes sent"], results["parameter bytes"] = order_and_bytes()
    results["bytes of sets"], results["bytes of micro-batches"] = bytes_sent(), bytes_sent(accumulate=3)
    kd_core.distributed.BUCKET_BYTES = 200  # many buckets, and parameters that are larger than one
    results["bytes in small buckets"] = bytes_sent()
    results["small buckets"] = state(train(BUILDS["two sets"], rank, world))
    torch.save(results, f"{output}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
