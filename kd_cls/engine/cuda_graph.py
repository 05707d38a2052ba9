"""SOLVER.CUDA_GRAPH: the whole training step as one CUDA graph.

The step of a small network is hundreds of kernels of a few microseconds each, and the host cannot launch them as fast
as a GPU runs them. A graph of them is captured once and launched as one. It runs the same kernels on the same memory
with the same numbers, so all that differs from step to step has to be in that memory, or be another graph:

- batch, learning rates, warm-up weight and iteration are tensors, filled before every replay;
- K of the top-k mask, the momenta and all other numbers of the optimizer form the *signature* of a graph. Where it
  changes, a few steps run as ever and the next is captured anew: K takes at most C − 1 values in a training.

The moving average is updated outside. An incomplete batch runs as ever. Written after the documentation of
`torch.cuda.graph`; it has not been run on a GPU yet (tests/kd_cls/engine/test_cuda_graph.py replays a recording on the
CPU, and compares on a GPU where there is one).
"""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from kd_core.losses import DistillationLoss
from kd_core.schedules import warmup
from kd_core.streams import backward_streams

if TYPE_CHECKING:
    from kd_cls.engine.trainer import Trainer

logger = logging.getLogger("kd_cls")

WARM_UP = 3  # steps before a capture, in which libraries and allocators settle: as many as PyTorch's examples take


class Recorder(Protocol):
    """How a step is recorded."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a step so that it may be recorded next."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What runs the kernels of `run` again."""


class CudaRecorder:
    """Capture by `torch.cuda.graph`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """On a stream of its own: what autograd and cuBLAS keep for a stream must not be the default one's."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture `run`, of which nothing is executed now.

        Raises:
            ValueError: something in it cannot be captured, such as a network that reads a value on the host.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's thread that pins memory calls CUDA meanwhile, which a "global" capture would not survive.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"SOLVER.CUDA_GRAPH: this step cannot be captured ({reason}): set it False") from error
        return graph.replay


class GraphedStep:
    """`Trainer.step` from the batch to the moved weights, replayed where it can be.

    No warm-up has to be undone: the steps before a capture are steps of the training, and a capture runs nothing.
    Random numbers stay those of (SEED, iteration): torch gives every replay the generator's seed of the moment.

    Args:
        trainer: whose step it is.
        recorder: how the step is recorded; None: as a CUDA graph.

    Raises:
        ValueError: no CUDA device, or a loss with numbers of its own.
    """

    def __init__(self, trainer: "Trainer", recorder: Recorder | None = None) -> None:
        device, groups = trainer.process.device, trainer.optimizer.param_groups
        if recorder is None:
            check_device(device)
        check_loss(trainer.task.distillation)
        self.trainer, self.recorder = trainer, recorder or CudaRecorder(device)
        self.batch_size = trainer.loaders.train.sampler.batch_size
        self.rates = [torch.zeros((), device=device) for _ in groups]  # float32: the fused kernel's type
        self.iteration = torch.zeros((), dtype=torch.float64, device=device)
        self.warmup_weight = torch.zeros((), dtype=torch.float64, device=device)
        self.captures = 0
        self.forget()

    def forget(self) -> None:
        """Drop the graph and its batch: weights or optimizer may lie in other memory now."""
        self.batch: tuple[Tensor, Tensor] | None = None
        self.signature: Any = None
        self.steps = 0  # with this signature
        self.replay: Callable[[], None] | None = None

    def takes(self, images: Tensor) -> bool:
        """Whether the batch is a full one."""
        return len(images) == self.batch_size

    def step(self, images: Tensor, target: Tensor) -> None:
        """A step on a full batch."""
        seen = self.trainer.meters.images
        if self.batch is None:
            self.batch = torch.empty_like(images), torch.empty_like(target)
        for static, now in zip(self.batch, (images, target), strict=True):
            static.copy_(now, non_blocking=True)
        self.fill_numbers()
        signature = self.current_signature()
        if signature != self.signature:
            self.signature, self.steps, self.replay = signature, 0, None
        self.steps += 1
        if self.steps <= WARM_UP:
            self.recorder.warm_up(self.run)
        else:
            if self.replay is None:
                self.capture()
            self.replay()
        self.trainer.meters.images = seen + len(images)  # a replay runs no Python

    def fill_numbers(self) -> None:
        """Write the numbers of this step to where the graph reads them; the host does not wait."""
        trainer, loss = self.trainer, self.trainer.task.distillation
        for rate, group in zip(self.rates, trainer.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.iteration.fill_(trainer.iteration + 1)
        if loss is not None:
            self.warmup_weight.fill_(warmup(trainer.progress, loss.warmup))

    def current_signature(self) -> list[Any]:
        """The numbers that a graph has in it for good."""
        trainer, loss = self.trainer, self.trainer.task.distillation
        classes = trainer.task.trainable_module.model.num_classes
        groups = [
            {name: value for name, value in group.items() if name not in ("params", "lr")}
            for group in trainer.optimizer.param_groups
        ]
        return [None if loss is None else loss.topk_size(trainer.progress, classes), *groups]

    def run(self) -> None:
        """The step on the batch and the numbers in memory."""
        trainer, loss = self.trainer, self.trainer.task.distillation
        weight = self.warmup_weight if loss is not None and loss.warmup > 0 else None
        groups = trainer.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            losses = trainer.losses(*self.batch, iteration=self.iteration, warmup_weight=weight)
            backward_streams(losses, trainer.optimizer)
            trainer.move_weights()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def capture(self) -> None:
        """Make the graph of the present signature."""
        self.replay = self.recorder.record(self.run)
        self.captures += 1
        if self.captures == 1:
            logger.info("SOLVER.CUDA_GRAPH: from iteration %d on, steps are replayed", self.trainer.iteration)


def check_device(device: torch.device) -> None:
    """Raise a ValueError where there is no CUDA to make a graph of."""
    if device.type != "cuda":
        raise ValueError(
            f"SOLVER.CUDA_GRAPH is True, but this run is on {device.type}: set DEVICE cuda where there is a GPU, or "
            "SOLVER.CUDA_GRAPH False"
        )


def check_loss(loss: Any) -> None:
    """Raise a ValueError for a loss that may have numbers of its own which change from step to step."""
    if loss is not None and getattr(type(loss), "forward", None) is not DistillationLoss.forward:
        raise ValueError(
            f"SOLVER.CUDA_GRAPH: {type(loss).__name__} has a forward of its own, and what it makes of progress is not "
            "known: write it as `row_terms` of a DistillationLoss, or set SOLVER.CUDA_GRAPH False"
        )
