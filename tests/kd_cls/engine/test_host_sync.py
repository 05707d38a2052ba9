"""A training step never waits for the device.

Three looks at the whole `Trainer.step`: on a device without data (FakeTensorMode's CUDA, which needs no GPU), where
whatever reads a value fails; on the CPU, where every read is named by the function that reads; and, where there is a
GPU, by CUDA's own debug mode.
"""

import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kd_cls.build import build_trainer
from kd_cls.distributed import Process
from kd_cls.engine.cuda_graph import WARM_UP, GraphedStep
from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.solver import build_optimizer, build_scheduler
from kd_cls.engine.trainer import Trainer

MASK = ["KD.LOSS.TOPK.ENABLED", True]
METHODS: dict[str, list] = {
    "plain": [],
    "kd": ["KD.LOSS.NAME", "kd"],
    "dkd, standardized, warmed up": [
        *["KD.LOSS.NAME", "dkd", "KD.LOSS.STANDARDIZE", True, "KD.LOSS.WARMUP_EPOCHS", 1],
    ],
    "gdkd": ["KD.LOSS.NAME", "gdkd"],
    "gdkd, auto k": ["KD.LOSS.NAME", "gdkd", "KD.LOSS.GDKD.AUTO_K", True, "KD.LOSS.GDKD.KL", "both"],
    "gdkd3": ["KD.LOSS.NAME", "gdkd3"],
    "aekt": ["KD.LOSS.NAME", "aekt"],
    "dot": ["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "dot_sgd"],
    "deepkd over kd": ["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "deepkd_sgd"],
    "deepkd over dkd, masked": ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", *MASK],
}
CLIPPED = ["SOLVER.CLIP_GRADIENTS.ENABLED", True]
FP16 = ["SOLVER.AMP.ENABLED", True, *CLIPPED]
BF16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]
AROUND = [*CLIPPED, "SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE_STEPS", 2, "MODEL.CHANNELS_LAST", True]
SETTINGS = {"float32": [], "float16": FP16, "bfloat16 and all around": [*BF16, *AROUND]}
MASKED = "deepkd over dkd, masked"
OTHER_STATISTICS = ["KD.TEACHER.MEAN", "(0.1, 0.2, 0.3)"]

# The fast form of a teacher is a copy that is made once, with values.
PLAIN_TEACHER = ["KD.TEACHER.FOLD_BN", False]


def pairs(methods: Iterable[str], start: int) -> list[tuple[str, str]]:
    """Every method with one of the settings in turn, and the masked DeepKD with all of them."""
    turns = list(zip(methods, islice(cycle(SETTINGS), start, None), strict=False))
    return turns + [pair for pair in product([MASKED], SETTINGS) if pair not in turns]


class DataFreeDevice(TorchDispatchMode):
    """Refuses copies between host and device, over a FakeTensorMode, which refuses to read from the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if "_fused_sgd_" in str(func):  # torch has no fake version of it; it works in place and returns nothing
            rates = [kwargs["lr"]] if isinstance(kwargs["lr"], Tensor) else []
            assert all(tensor.is_cuda for tensors in (*args[:3], rates) for tensor in tensors)
            return None
        if func is torch.ops.aten._to_copy.default and kwargs.get("device", args[0].device).type != args[0].device.type:
            raise AssertionError(f"a copy from {args[0].device} to {kwargs['device']}")
        if func is torch.ops.aten.copy_.default and args[0].device.type != args[1].device.type:
            raise AssertionError(f"a copy from {args[1].device} to {args[0].device}")
        return func(*args, **kwargs)


@contextmanager
def data_free_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, "cuda" is a device without data, on which autocast and GradScaler are as on a real one."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_: True)
    with FakeTensorMode(), DataFreeDevice():
        yield


def move_without_data(module: nn.Module) -> None:
    """`module.cuda()` for a device without data (Module.to cannot)."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
                    learns = isinstance(tensor, nn.Parameter)
                    tensors[name] = nn.Parameter(moved, tensor.requires_grad) if learns else moved


def trainer_without_data(cfg: CfgNode, trainer: Trainer) -> Trainer:
    """The trainer of `cfg` on the device without data."""
    task = trainer.task.train()
    move_without_data(task)
    task.device = torch.device("cuda")
    optimizer = build_optimizer(cfg, task.trainable_module)
    scheduler = build_scheduler(cfg, optimizer, trainer.steps_per_epoch)
    return Trainer(cfg, task, trainer.loaders, optimizer, scheduler, Process(task.device), trainer.describe)


def fill_gradients(loss: Tensor, retain_graph: bool = False) -> None:
    """In place of `Tensor.backward`, whose engine asks the driver for the device: a gradient for every parameter."""
    for p in fill_gradients.params:
        gradient = torch.empty_like(p)
        p.grad = gradient if p.grad is None else p.grad + gradient


@pytest.mark.parametrize(("method", "settings"), pairs(METHODS, 0))
def test_a_step_runs_on_a_device_that_has_no_values_to_read(
    method: str, settings: str, tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(*METHODS[method], *SETTINGS[settings], *OTHER_STATISTICS, *PLAIN_TEACHER)
    trainer = build_trainer(cfg, process)
    with data_free_cuda(monkeypatch):
        trainer = trainer_without_data(cfg, trainer)
        fill_gradients.params = list(trainer.task.trainable_module.parameters())
        monkeypatch.setattr(Tensor, "backward", fill_gradients)
        images, target = torch.empty(16, 3, 16, 16, device="cuda"), torch.empty(16, dtype=torch.int64, device="cuda")
        for _ in range(2):
            trainer.step(images, target, 0, torch.arange(16))
        assert trainer.meters.sums.is_cuda and trainer.iteration == 2
        assert trainer.task.trainable_module.model.conv1.weight.is_cuda


class Listener:
    """Runs a step where a CUDA graph of it would be captured."""

    def warm_up(self, run: Callable[[], None]) -> None:
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()
        return lambda: None


@pytest.mark.parametrize("method", ["plain", "dkd, standardized, warmed up", "gdkd, auto k", MASKED])
def test_what_a_cuda_graph_captures_reads_nothing_and_takes_nothing_from_the_host(
    method: str, tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny(*METHODS[method], *BF16, *CLIPPED, *OTHER_STATISTICS, *PLAIN_TEACHER)
    trainer = build_trainer(cfg, process)
    with data_free_cuda(monkeypatch):
        trainer = trainer_without_data(cfg, trainer)
        trainer.graph = GraphedStep(trainer.run_step, trainer.task, trainer.optimizer, 16, Listener())
        fill_gradients.params = list(trainer.task.trainable_module.parameters())
        monkeypatch.setattr(Tensor, "backward", fill_gradients)
        images, target = torch.empty(16, 3, 16, 16, device="cuda"), torch.empty(16, dtype=torch.int64, device="cuda")
        trainer.max_iter = 1000  # K stays what it is
        for _ in range(WARM_UP + 2):
            trainer.step(images, target, 0, torch.arange(16))
        assert trainer.graph.captures == 1 and trainer.graph.rates[0].is_cuda


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
        lambda x: x * torch.tensor(2.0, device="cuda"),  # a copy from memory that is not pinned
        lambda x: x + torch.ones(3).to("cuda"),
    ],
)
def test_the_device_without_data_refuses(read: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = (DataDependentOutputException, DynamicOutputShapeException, AssertionError, NotImplementedError)
    with data_free_cuda(monkeypatch):
        x = torch.empty(3, device="cuda")
        with pytest.raises(refusals):
            read(x)


READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")


class HostReads(TorchDispatchMode):
    """Notes which function of the project, of timm or of GradScaler reads a value, or takes a shape from values."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or func.overloadpacket.__name__ in READING:
            frames = [frame for frame in traceback.extract_stack() if is_ours(frame.filename)]
            self.readers.add(f"{Path(frames[-1].filename).stem}.{frames[-1].name}")
        return func(*args, **(kwargs or {}))


def is_ours(filename: str) -> bool:
    return filename != __file__ and any(part in filename for part in ("/kd_core/", "/kd_cls/", "/timm/", "grad_scaler"))


# What a step on the CPU reads and one on CUDA does not: there nobody waits for a value.
ON_THE_CPU_ALONE = {
    "meters.check",  # stops at the first loss that is no number; on CUDA at the next line of the log
    "checks.<genexpr>",  # the range of the target; on CUDA the indexing kernel asserts it
    "base.clip_grad_norm_",  # nothing to multiply where the norm is small
    "gradients._follow",  # whether p.grad is what the scaler made of it; on CUDA a kernel asserts it
    "partition_blocks.find_neg_inf",  # whether a logit is −inf; on CUDA every row is treated as if one might be
}
# What a step reads by design.
BY_DESIGN = {
    "stream_adamw._count_step",  # a counter that lives on the host
    "stream_adamw.step",  # under float16: whether to count the step
    "grad_scaler.<genexpr>",  # under float16: GradScaler.step, for optimizers that do not look at found_inf themselves
    "_helpers._get_value",  # such a counter of timm's lamb
}


def readers(trainer: Trainer) -> set[str]:
    """Who reads a value in the second of two steps."""
    images, target = next(iter(trainer.loaders.train))
    trainer.task.train()
    trainer.step(images, target, 0, torch.arange(len(images)))
    with HostReads() as reads:
        trainer.step(images, target, 0, torch.arange(len(images)))
    return reads.readers


AUTO = ["SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 8]
ALSO = {"momenta auto": ["KD.LOSS.NAME", "dkd", *AUTO], "mixup": ["SOLVER.MIXUP.ALPHA", 0.5]}


# The others take the same backward passes.
BACKWARD = ["kd", "dkd, standardized, warmed up", "gdkd, auto k", "aekt", MASKED, *ALSO]


@pytest.mark.parametrize(("method", "settings"), pairs(BACKWARD, 1))
def test_backward_passes_and_all_else_read_nothing_that_cuda_would_wait_for(
    method: str, settings: str, tiny: Callable, process: Process
) -> None:
    options = (METHODS | ALSO)[method]
    found = readers(build_trainer(tiny(*options, *SETTINGS[settings], *OTHER_STATISTICS), process))
    assert "meters.check" in found and found <= ON_THE_CPU_ALONE


def test_what_reads_by_design_is_known_by_name(tiny: Callable, process: Process) -> None:
    adamw = build_trainer(tiny("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "stream_adamw", *FP16), process)
    lamb = build_trainer(tiny("SOLVER.OPTIMIZER", "lamb", "SOLVER.AMP.ENABLED", True), process)
    assert (readers(adamw) | readers(lamb)) - ON_THE_CPU_ALONE == BY_DESIGN


def test_an_evaluation_that_counts_confusions_reads_nothing_before_its_last_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class AllBatchesSeen(Exception):
        pass

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(2):
            yield torch.empty(4, 10, device="cuda"), torch.empty(4, dtype=torch.int64, device="cuda")
        raise AllBatchesSeen

    with data_free_cuda(monkeypatch):
        confusions = torch.zeros(10, 10, dtype=torch.int64, device="cuda")
        with pytest.raises(AllBatchesSeen):
            evaluate(lambda images: images, batches(), Process(torch.device("cuda")), confusions=confusions)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
def test_cuda_itself_sees_no_wait_in_a_step(method: str, settings: str, tiny: Callable) -> None:
    trainer = build_trainer(
        tiny(*METHODS[method], *SETTINGS[settings], "DEVICE", "cuda"), Process(torch.device("cuda"))
    )
    batches = [(images.clone(), target.clone()) for images, target in trainer.loaders.train]
    trainer.task.train()
    trainer.step(*batches[0], 0, torch.arange(16))
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(*batches[1], 0, torch.arange(16))
    finally:
        torch.cuda.set_sync_debug_mode("default")
