"""What the gradient streams look like while they train."""

import math

import torch
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from torch import nn

from kd_core.optim import StreamOptimizer
from kd_core.optim.base import MOMENTA, label


class StreamScalars(HookBase):
    """Every `period` iterations, puts what `stream_scalars` says into the event storage; to precede the writers."""

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
    """`grad_norm/<streams>` of every set, unscaled and clipped as it was stepped by; `momentum/<stream>`; `loss_scale`.

    Streams of equal momentum are one gradient, so their norm is that of the sum, named `tog+ncg`.
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
    """`gsnr/<stream>` as SOLVER.MOMENTA auto has measured it so far, on this rank's batches; nothing once momenta are
    set from it, and before two samples.
    """
    auto = getattr(step, "auto_momenta", None)
    if auto is None or auto.momenta is not None:
        return {}
    return {f"gsnr/{stream}": value for stream, value in auto.gsnr.overall().items() if math.isfinite(value)}


def admitted_classes(model: nn.Module) -> dict[str, float]:
    """`topk/K`: how many non-target classes the dynamic top-k mask admits now; nothing where there is no mask."""
    loss = getattr(model, "loss", None)
    masks = [part.topk for part in loss.modules() if getattr(part, "topk", None) is not None] if loss else []
    classes = model.roi_heads.num_classes + 1 if masks else 0
    return {"topk/K": float(masks[0].k(model.progress(), classes))} if masks else {}
