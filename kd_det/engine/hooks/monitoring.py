"""Hooks that log more scalars: of the gradient streams, and of where an iteration's time goes."""

import math
import time
from itertools import pairwise
from typing import Any

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.utils.hooks import RemovableHandle

from kd_core.optim import StreamOptimizer
from kd_core.optim.base import MOMENTA, label

STAGES = ("forward", "backward", "step")


class StreamScalars(HookBase):
    """Every `period` iterations, puts the scalars below into the event storage; must precede the writers."""

    def __init__(self, period: int = 20) -> None:
        self.period = period

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.period == 0 and comm.is_main_process():
            step = self.trainer._trainer
            scalars = {
                **stream_scalars(step),
                **measured_gsnr(step),
                **admitted_classes(self.trainer.checkpointer.model),
            }
            for name, value in scalars.items():
                self.trainer.storage.put_scalar(name, value, smoothing_hint=False)


def stream_scalars(step: SimpleTrainer) -> dict[str, float]:
    """`grad_norm/<streams>` of every set, unscaled and clipped; `momentum/<stream>`; `loss_scale`.

    Streams of equal momentum share one gradient: their norm is that of the sum, named `tog+ncg`.
    """
    scalars = {}
    optimizer = step.optimizer
    if isinstance(optimizer, StreamOptimizer):
        for streams, gradient in zip(optimizer.gradients.sets, optimizer.gradients.of_set, strict=True):
            if gradient:
                scalars[f"grad_norm/{label(streams)}"] = float(torch.nn.utils.get_total_norm(gradient.values()))
        scalars.update((f"momentum/{stream}", m) for stream, m in optimizer.param_groups[0][MOMENTA].items())
    scaler = getattr(step, "scaler", None)
    if scaler is not None and scaler.is_enabled():
        scalars["loss_scale"] = scaler.get_scale()
    return scalars


def measured_gsnr(step: SimpleTrainer) -> dict[str, float]:
    """`gsnr/<stream>` as SOLVER.MOMENTA auto has measured it so far, on this rank's batches.

    Empty before two samples, and once the momenta are set from it.
    """
    auto = getattr(step, "auto_momenta", None)
    if auto is None or auto.momenta is not None:
        return {}
    return {f"gsnr/{stream}": value for stream, value in auto.gsnr.overall().items() if math.isfinite(value)}


def admitted_classes(model: nn.Module) -> dict[str, float]:
    """`topk/K`: number of non-target classes that the dynamic top-k mask admits now; empty without a mask.

    A PanopticFPN has two numbers of classes: it is that of its boxes.
    """
    loss = getattr(model, "loss", None)
    masks = [part.topk for part in loss.modules() if getattr(part, "topk", None) is not None] if loss else []
    classes = getattr(model, "logit_classes", 0)
    return {"topk/K": float(masks[0].k(model.progress(), classes))} if masks and classes else {}


class StageTimes(HookBase):
    """Puts `time/forward`, `time/backward` and `time/step` (seconds of an iteration) into the event storage.

    forward: the losses, with the teacher. backward: from there to the optimizer, with the reduction over the
    processes, reading the losses and clipping. step: the optimizer. detectron2 itself logs `time` (all of it),
    `data_time` (waiting for images) and `eta_seconds`. Micro-batches add up.

    On a GPU, the marks are CUDA events that are read an iteration later, so that the host does not wait for them.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []  # (stage that begins, when) of this iteration
        self.previous: list[tuple[str, Any]] = []  # of the previous one, which the device has finished
        self.handles: list[RemovableHandle] = []

    def before_train(self) -> None:
        step = self.trainer._trainer
        self.cuda = next(step.model.parameters()).is_cuda
        if comm.is_main_process():
            self.handles = [
                step.model.register_forward_pre_hook(lambda *_: self.mark("forward")),
                step.model.register_forward_hook(lambda *_: self.mark("backward")),
                step.optimizer.register_step_pre_hook(lambda *_: self.mark("step")),
            ]
            step.before_data = lambda: self.mark("data")

    def before_step(self) -> None:
        self.mark("data")

    def after_step(self) -> None:
        self.mark("")
        if comm.is_main_process() and self.previous:
            seconds = stage_seconds(self.previous)
            self.trainer.storage.put_scalars(**{f"time/{stage}": seconds[stage] for stage in STAGES})
        self.previous, self.marks = self.marks, []

    def after_train(self) -> None:
        for handle in self.handles:
            handle.remove()

    def mark(self, stage: str) -> None:
        """`stage` begins now."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((stage, now))


def stage_seconds(marks: list[tuple[str, Any]]) -> dict[str, float]:
    """Seconds of every stage between its marks and the next ones; 0 for a stage without any."""
    seconds = dict.fromkeys(("data", *STAGES), 0.0)
    for (stage, start), (_, end) in pairwise(marks):
        seconds[stage] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return seconds
