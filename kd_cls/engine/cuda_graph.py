"""SOLVER.CUDA_GRAPH: the whole training step as one CUDA graph.

The step of a small network is hundreds of kernels of a few microseconds each, and the host cannot launch them as fast
as a GPU runs them. A graph of them is captured once and launched as one. It runs the same kernels on the same memory
with the same numbers. So everything that differs from step to step has to be in that memory, or be another graph:

- batch, learning rates, warm-up weight and step number are tensors, filled before every replay;
- K of the top-k mask, the momenta and all other numbers of the optimizer form the *signature* of a graph. Where it
  changes, a few steps run eagerly and the next is captured anew: K takes at most C − 1 values in a training.

The moving average is updated outside. An incomplete batch runs eagerly. tests/kd_cls/engine/test_cuda_graph.py replays
a recording on the CPU, and graphs on a GPU where there is one.
"""

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_cls.task.distillation import DistillationTask
from kd_core.losses import DistillationLoss
from kd_core.schedules import warmup
from kd_core.utils.errors import UserError, one_line

logger = logging.getLogger("kd_cls")

WARM_UP = 3  # steps before a capture, in which libraries and allocators settle: as many as PyTorch's examples take


class Recorder(Protocol):
    """How a step is recorded."""

    def warm_up(self, run: Callable[[], None]) -> None:
        """Run a step in a way that prepares its recording."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What runs the kernels of `run` again."""


class CudaRecorder:
    """Capture by `torch.cuda.graph`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """On a stream of its own: what autograd and cuBLAS keep per stream must not belong to the default one."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            run()
        current.wait_stream(self.stream)

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Capture `run`, of which nothing is executed now.

        Raises:
            UserError: something in it cannot be captured, such as a network that reads a value on the host.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            # The loader's thread that pins memory calls CUDA meanwhile, which a "global" capture would not survive.
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as error:
            reason = one_line(error)
            raise UserError(f"SOLVER.CUDA_GRAPH: this step cannot be captured ({reason}): set it False") from error
        return graph.replay


class GraphedStep:
    """A training step from the batch to the updated weights, replayed where it can be.

    No warm-up has to be undone: the steps before a capture are steps of the training, and a capture runs nothing.
    Random numbers stay those of (SEED, iteration): torch gives every replay the generator's current seed.

    Args:
        run_step: takes one step on (images, target, step number from 1, warm-up weight or None), all tensors.
        task, optimizer: of the step.
        batch_size: of a full batch.
        recorder: how the step is recorded; None: as a CUDA graph.

    Raises:
        UserError: a loss with numbers of its own.
    """

    def __init__(
        self,
        run_step: Callable[[Tensor, Tensor, Tensor, Tensor | None], None],
        task: DistillationTask,
        optimizer: Optimizer,
        batch_size: int,
        recorder: Recorder | None = None,
    ) -> None:
        device, self.loss = task.device, task.distillation
        check_loss(self.loss)
        self.run_step, self.task, self.optimizer, self.batch_size = run_step, task, optimizer, batch_size
        self.recorder = recorder or CudaRecorder(device)
        # float32: the fused kernel's type
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.number = torch.zeros((), dtype=torch.float64, device=device)
        self.warmup_weight = torch.zeros((), dtype=torch.float64, device=device)
        self.captures = 0
        self.forget()

    def forget(self) -> None:
        """Drop the graph and its batch: weights or optimizer may lie in other memory now."""
        self.batch: tuple[Tensor, Tensor] | None = None
        self.signature: Any = None
        self.steps = 0  # with this signature
        self.replay: Callable[[], None] | None = None

    def step(self, images: Tensor, target: Tensor, iteration: int, progress: float) -> None:
        """A step on a full batch; `iteration` counts from 0, `progress` is iteration / max_iter."""
        if self.batch is None:
            self.batch = torch.empty_like(images), torch.empty_like(target)
        for static, now in zip(self.batch, (images, target), strict=True):
            static.copy_(now, non_blocking=True)
        self.fill_numbers(iteration, progress)
        signature = self.current_signature(progress)
        if signature != self.signature:
            self.signature, self.steps, self.replay = signature, 0, None
        self.steps += 1
        if self.steps <= WARM_UP:
            self.recorder.warm_up(self.run)
            return
        if self.replay is None:
            self.replay = self.recorder.record(self.run)
            self.captures += 1
            if self.captures == 1:
                logger.info("SOLVER.CUDA_GRAPH: from iteration %d on, steps are replayed", iteration)
        self.replay()

    def fill_numbers(self, iteration: int, progress: float) -> None:
        """Write the numbers of this step to where the graph reads them; the host does not wait."""
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.number.fill_(iteration + 1)
        if self.loss is not None:
            self.warmup_weight.fill_(warmup(progress, self.loss.warmup))

    def current_signature(self, progress: float) -> list[Any]:
        """The numbers that are constants of a graph."""
        classes = self.task.trainable_module.model.num_classes
        groups = [{k: v for k, v in g.items() if k not in ("params", "lr")} for g in self.optimizer.param_groups]
        return [None if self.loss is None else self.loss.topk_size(progress, classes), *groups]

    def run(self) -> None:
        """The step on the batch and the numbers in memory."""
        weight = self.warmup_weight if self.loss is not None and self.loss.warmup > 0 else None
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self.rates, strict=True):
                group["lr"] = rate
            self.run_step(*self.batch, self.number, weight)
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate


def check_loss(loss: Any) -> None:
    """Raise a UserError for a loss that may have numbers of its own which change from step to step."""
    if loss is not None and getattr(type(loss), "forward", None) is not DistillationLoss.forward:
        raise UserError(
            f"SOLVER.CUDA_GRAPH: {type(loss).__name__} has a forward of its own, and how it uses progress is not "
            "known: write it as `row_terms` of a DistillationLoss, or set SOLVER.CUDA_GRAPH False"
        )
