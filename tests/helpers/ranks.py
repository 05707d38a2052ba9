"""The ranks of a gloo group, started by test_distributed.py: each runs every scenario and saves what its parameters
became.

python ranks.py WORLD_SIZE OUTPUT_FOLDER: the ranks are forked, so that torch is imported once.
"""

import multiprocessing
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
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
FSDP2_BUILDS = {name: BUILDS[name] for name in ("one set", "two sets", "three sets", "adamw")}
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


def uneven_scaled(rank: int, world: int) -> nn.Module:
    """fp16's scaler, clipping and two micro-batches; rank 0 has no batch in steps 0 and 2."""
    model = Net()
    optimizer = deepkd_sgd(model.parameters(), 0.05, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for step in range(4):
        optimizer.zero_grad()
        for row in (2 * rank, 2 * rank + 1):
            empty = step in (0, 2) and rank == 0
            backward_streams({} if empty else streams(model, step, slice(row, row + 1)), optimizer, scaler=scaler)
        optimizer.clip_grad_norm_(0.5)
        scaler.step(optimizer)
        scaler.update()
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


def subgroup(rank: int, world: int) -> float:
    """How far gradients averaged within {0} and within the other ranks are from those of one process."""
    members = [0] if rank == 0 else list(range(1, world))
    groups = [dist.new_group([0]), dist.new_group(list(range(1, world)))]
    model = Net()
    optimizer = deepkd_sgd(model.parameters(), 0.05)
    backward_streams(streams(model, 0, slice(rank, 3 * rank + 1)), optimizer, process_group=groups[min(rank, 1)])
    mean = Net()
    backward_streams(
        {
            name: sum(streams(mean, 0, slice(r, 3 * r + 1))[name] for r in members) / len(members)
            for name in ("tog", "tcg", "ncg")
        },
        deepkd_sgd(mean.parameters(), 0.05),
        sync=False,
    )
    pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), mean.parameters(), strict=True) if p.grad is not None]
    return max(float((g - h).abs().max()) for g, h in pairs)


def sharded(model: nn.Module) -> nn.Module:
    model.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    for part in (model.backbone, model.classifier, model.task_head):
        fully_shard(part)
    return fully_shard(model)


def fsdp2(build: Callable, rank: int, world: int, folder: str, parts: int = 1, clip: str = "own") -> list[Tensor]:
    """Twenty steps, in the tenth of which model and optimizer are saved and built anew. Whole parameters."""
    model = sharded(Net())
    optimizer = build(model.parameters())
    for step in range(20):
        if step == 10:
            names = "model", "optimizer"
            dcp.save(dict(zip(names, get_state_dict(model, optimizer), strict=True)), checkpoint_id=folder)
            model = sharded(Net())
            optimizer = build(model.parameters())
            saved = dict(zip(names, get_state_dict(model, optimizer), strict=True))
            # What no stream has reached has no state: it starts at 0.
            dcp.load(saved, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
            set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        fsdp2_step(model, optimizer, step, rank, world, parts, clip)
    return [p.full_tensor().detach() for p in model.parameters()]


def fsdp2_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: int, rank: int, world: int, parts: int, clip: str
) -> None:
    optimizer.zero_grad()
    for part in range(parts):
        losses = streams(model, step, share(rank, world, part, parts))
        backward_streams({name: loss / parts for name, loss in losses.items()}, optimizer, sync=part == parts - 1)
    if clip == "torch" or not hasattr(optimizer, "clip_grad_norm_"):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    else:
        optimizer.clip_grad_norm_(0.5)
    optimizer.step()


def message(run: Callable[[], object]) -> str:
    try:
        run()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals(rank: int, world: int) -> dict[str, str]:
    """What is said to FSDP1, and to FSDP2 used so that streams would mix."""
    said = {}
    for use_orig_params in (False, True):
        for name in ("one set", "two sets", "torch's sgd"):
            inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
            model = FullyShardedDataParallel(inner, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
            optimizer = BUILDS[name](model.parameters())
            loss = model(torch.ones(2, 4)).sum()
            said[f"{name}, {use_orig_params}"] = message(lambda: backward_streams({"tog": loss}, optimizer))  # noqa: B023
    model = sharded(Net())
    optimizer = BUILDS["two sets"](model.parameters())
    model.set_requires_gradient_sync(False)
    said["no reduction"] = message(
        lambda: backward_streams(streams(model, 0, share(rank, world)), optimizer, sync=False)
    )
    model = sharded(Net())
    optimizer = BUILDS["two sets"](model.parameters())
    backward_streams(streams(model, 0, share(rank, world)), optimizer)
    if rank == 0:  # all ranks have asked to write, one has changed something
        model.classifier.weight.grad.data.add_(1)
    else:
        model.classifier.weight.grad.data.add_(0)
    said["changed on rank 0"] = message(optimizer.step)
    said["gsnr"] = message(lambda: AutoMomenta(optimizer, model.named_parameters()))
    return said


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
    results["uneven, scaled"] = state(uneven_scaled(rank, world))
    results["without foreground"] = state(without_foreground(rank, world))
    model, scales, moved = infinity(rank, world)
    results["infinity"], results["scales"], results["moved"] = state(model), scales, moved
    results["auto momenta"] = auto_momenta(rank, world)
    results["events"], results["bytes sent"], results["parameter bytes"] = order_and_bytes()
    results["bytes of sets"], results["bytes of micro-batches"] = bytes_sent(), bytes_sent(accumulate=3)
    kd_core.distributed.BUCKET_BYTES = 200  # many buckets, and parameters that are larger than one
    results["bytes in small buckets"] = bytes_sent()
    results["small buckets"] = state(train(BUILDS["two sets"], rank, world))
    kd_core.distributed.BUCKET_BYTES = 25 * 2**20
    results["subgroup"] = subgroup(rank, world) <= 1e-14
    if world == 2:
        for name, build in FSDP2_BUILDS.items():
            results[f"fsdp2, {name}"] = fsdp2(build, rank, world, f"{output}/{name}")
        folder = f"{output}/parts"
        results["fsdp2, micro-batches, clipped by torch"] = fsdp2(BUILDS["two sets"], rank, world, folder, 2, "torch")
        results["refusals"] = refusals(rank, world)
    torch.save(results, f"{output}/rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    world, output = int(sys.argv[1]), sys.argv[2]
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=main, args=(rank, world, f"{output}/store", output)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
