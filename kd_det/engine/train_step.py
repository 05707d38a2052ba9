"""The training step over gradient streams: micro-batches, mixed precision, several processes."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer, TrainerBase
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kd_core.optim import StreamOptimizer
from kd_core.optim.config import build_auto_momenta
from kd_core.train_step import TrainStep
from kd_core.utils.compiling import compile_in_place
from kd_det.modeling.meta_arch.distilled import Distilled
from kd_det.modeling.teacher.acceleration import distilled_parts
from kd_det.solver import build_clip

KD_TERM = re.compile(r"loss_kd_(?P<term>.+?)(_stage\d+)?(_pixels)?")


class StreamTrainer(SimpleTrainer):
    """detectron2's `SimpleTrainer` with the step of `kd_core.train_step`.

    An iteration is one optimizer step on the mean of several micro-batches. The forward pass of
    DistributedDataParallel is in `no_sync`: `TrainStep` averages the gradients over the processes.

    Args:
        model: returns a dict of scalar losses; may be wrapped for several processes.
        data_loader: yields micro-batches.
        step: over the model's parameters; the forward pass is in autocast to its dtype.
        streams: stream of every term of the distillation loss (`loss.streams`); all other losses are the task's, `tog`.
        micro_batches: of a step (SOLVER.ACCUMULATE_STEPS).
    """

    def __init__(
        self, model: nn.Module, data_loader: Any, step: TrainStep, streams: Mapping[str, str], micro_batches: int = 1
    ) -> None:
        super().__init__(model, data_loader, step.optimizer)
        self.train_step, self.streams, self.micro_batches = step, dict(streams), range(micro_batches)
        self.scaler, self.auto_momenta = step.scaler, step.auto_momenta
        self.before_data: Callable[[], None] = lambda: None  # StageTimes sets it: what follows waits for images

    def run_step(self) -> None:
        """One optimizer step."""
        if not self.model.training:
            raise RuntimeError("the model is in eval mode: call model.train() before a training step")
        self.data_time, self.shown = 0.0, []
        self.train_step.backward(self.micro_batches, self.next_losses, self.iter, weight=1 / len(self.micro_batches))
        self._write_metrics(mean(self.shown), self.data_time)  # raises at a loss that is not finite, before the step
        self.train_step.optimizer_step()

    def next_losses(self, _: int) -> dict[str, Tensor]:
        """The streams' losses of the loader's next micro-batch, in the autocast dtype."""
        self.before_data()
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self.data_time += time.perf_counter() - start
        alone = self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()
        device, dtype = self.train_step.device.type, self.train_step.dtype
        with alone, torch.autocast(device, dtype, enabled=dtype is not None):
            losses = self.model(batch)
        self.shown.append(AsyncScalars(losses))  # queued now: reading need not wait for the backward pass
        return stream_losses(losses, self.streams)

    def state_dict(self) -> dict[str, Any]:
        """The keys of detectron2's trainers and `auto_momenta`; `grad_scaler` and that only where there are any."""
        state = self.train_step.state_dict()
        state["grad_scaler"] = state.pop("scaler")
        return TrainerBase.state_dict(self) | {key: value for key, value in state.items() if value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        TrainerBase.load_state_dict(self, state_dict)
        self.train_step.load_state_dict(state_dict | {"scaler": state_dict.get("grad_scaler")})


class AsyncScalars:
    """Named losses, copied to the host while the device continues.

    `.item()` of each would wait for everything that is queued. The constructor queues one copy into pinned memory;
    `read` waits for that copy alone, not for the backward pass that was queued after it.

    Args:
        scalars: tensors of one device, detached here.
    """

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self.names, self.copied = list(scalars), None
        self.values = torch.stack([scalar.detach().reshape(()) for scalar in scalars.values()])
        if self.values.is_cuda:
            stream, pinned = torch.cuda.current_stream(self.values.device), {"device": "cpu", "pin_memory": True}
            self.values = torch.empty_like(self.values, **pinned).copy_(self.values, non_blocking=True)
            self.copied = stream.record_event()

    def read(self) -> dict[str, Tensor]:
        """The scalars, on the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.unbind(), strict=True))


def mean(micro_batches: Sequence[AsyncScalars]) -> dict[str, Tensor]:
    """The mean of each scalar over the micro-batches; one that a micro-batch lacks counts as 0 there."""
    means: dict[str, Tensor] = {}
    for scalars in micro_batches:
        for name, value in scalars.read().items():
            means[name] = means.get(name, 0) + value / len(micro_batches)
    return means


def stream_losses(losses: Mapping[str, Tensor], streams: Mapping[str, str]) -> dict[str, Tensor]:
    """The summed loss of every stream: `loss_kd_<term>[_stage<k>][_pixels]` to the term's, all others to `tog`.

    Raises:
        ValueError: a distillation term that `streams` does not know.
    """
    summed: dict[str, Tensor] = {}
    for name, loss in losses.items():
        stream = "tog"
        if match := KD_TERM.fullmatch(name):
            stream = streams.get(match["term"])
            if stream is None:
                raise ValueError(
                    f"{name} belongs to no stream: the terms of the loss are {', '.join(streams) or 'none'}"
                )
        summed[stream] = summed[stream] + loss if stream in summed else loss
    return summed


def build_step(cfg: CfgNode, model: nn.Module, data_loader: Any, optimizer: Optimizer) -> SimpleTrainer:
    """detectron2's own step where it can do what `cfg.SOLVER` asks for, else the one over streams."""
    solver = cfg.SOLVER
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    clip = build_clip(cfg, optimizer)
    if cfg.KD.COMPILE:
        for name, part in distilled_parts(plain).items():
            compile_in_place(part, f"student's {name}")
    streamed = isinstance(optimizer, StreamOptimizer)
    if not (streamed or solver.AMP.ENABLED or clip) and solver.ACCUMULATE_STEPS == 1:
        return SimpleTrainer(model, data_loader, optimizer)
    if solver.AMP.ENABLED:
        pool_in_float32(plain)
    dtype = getattr(torch, solver.AMP.DTYPE) if solver.AMP.ENABLED else None
    streams = plain.streams() if isinstance(plain, Distilled) else {}
    auto_momenta = build_auto_momenta(solver, optimizer, plain.named_parameters(), {"tog", *streams.values()})
    step = TrainStep(optimizer, dtype, clip, auto_momenta)
    return StreamTrainer(model, data_loader, step, streams, solver.ACCUMULATE_STEPS)


def pool_in_float32(model: nn.Module) -> None:
    """Let every ROI pooler of `model`, and of its teachers, work in float32 under autocast.

    detectron2 rounds boxes to the type of the features: 517.3 is 516 in bfloat16 and 517.5 in float16.
    """
    for detector in (model, *(teacher.model for teacher in getattr(model, "teachers", ()))):
        for module in detector.modules():
            if isinstance(module, ROIPooler):
                module.register_forward_pre_hook(widen_features)


def widen_features(pooler: nn.Module, inputs: tuple[list[Tensor], Any]) -> tuple[list[Tensor], Any]:
    """A forward pre-hook: feature maps in float32, or what is wider."""
    features, boxes = inputs
    return [f.to(torch.promote_types(f.dtype, torch.float32)) for f in features], boxes
