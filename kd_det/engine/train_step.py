"""The training step over gradient streams: micro-batches, mixed precision, several processes."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kd_core.optim.config import build_auto_momenta
from kd_core.optim.gsnr import AutoMomenta
from kd_core.streams import backward_streams
from kd_core.utils.compiling import compile_in_place
from kd_det.engine.host_copy import HostCopy, total
from kd_det.modeling.teacher.acceleration import distilled_parts
from kd_det.solver import build_clip

KD_TERM = re.compile(r"loss_kd_(?P<term>.+?)(_stage\d+)?")


class StreamTrainer(SimpleTrainer):
    """detectron2's `SimpleTrainer` whose step is: forward, terms → streams, `backward_streams`, clip, step.

    Every iteration is one optimizer step on `accumulate_steps` micro-batches of the loader, gradients averaged.
    Under DistributedDataParallel the forward pass is in `no_sync`, and `backward_streams` averages over the processes
    with the last micro-batch. An optimizer of torch's takes all streams as one, so that it too may accumulate and use
    mixed precision.

    Args:
        model: returns a dict of scalar losses; may be wrapped for several processes.
        data_loader: yields micro-batches.
        optimizer: a stream optimizer, or any of torch's.
        streams: stream of every term of the distillation loss (`loss.streams`); all other losses are the task's, `tog`.
        accumulate_steps: micro-batches of a step.
        dtype: of autocast; None for none. float16 has a loss scaler, whose infinities skip the step of all streams.
        clip: clips the optimizer's gradients, unscaled and complete; None where none are, or where its step does it.
        auto_momenta: sets the optimizer's momenta from the streams' measured GSNR.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: Optimizer,
        streams: Mapping[str, str],
        *,
        accumulate_steps: int = 1,
        dtype: torch.dtype | None = None,
        clip: Callable[[], object] | None = None,
        auto_momenta: AutoMomenta | None = None,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        self.streams, self.accumulate_steps, self.dtype = dict(streams), accumulate_steps, dtype
        self.clip, self.auto_momenta = clip, auto_momenta
        self.device = next(model.parameters()).device
        self.before_data: Callable[[], None] = lambda: None  # for whoever times the step: what follows waits for images
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)

    def run_step(self) -> None:
        """One optimizer step."""
        if not self.model.training:
            raise RuntimeError("the model is in eval mode: call model.train() before a training step")
        self.optimizer.zero_grad()
        losses: list[HostCopy] = []
        data_time = 0.0
        for micro_step in range(self.accumulate_steps):
            self.before_data()
            start = time.perf_counter()
            batch = next(self._data_loader_iter)
            data_time += time.perf_counter() - start
            losses.append(self.micro_step(batch, micro_step))
        self._write_metrics(total(losses), data_time)  # raises where a loss is not finite, before any weight is changed
        self.update()

    def micro_step(self, batch: list[dict[str, Any]], index: int) -> HostCopy:
        """Forward and backward of micro-batch `index`; returns its share of every loss."""
        losses = self.forward(batch)
        if index == 0 and self.auto_momenta is not None:
            scale = self.scaler.scale(torch.ones((), device=self.device))  # get_scale() would wait for it
            self.auto_momenta.observe(stream_losses(losses, self.streams), self.iter, scale)
        losses = {name: loss / self.accumulate_steps for name, loss in losses.items()}
        shares = HostCopy(losses)  # before the backward pass, which nobody has to wait for then
        last = index == self.accumulate_steps - 1
        backward_streams(stream_losses(losses, self.streams), self.optimizer, self.scaler, sync=last)
        return shares

    def forward(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """The losses of a micro-batch, in the autocast dtype, with nothing reduced over processes."""
        alone = self.model.no_sync() if isinstance(self.model, DistributedDataParallel) else nullcontext()
        with alone, torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.model(batch)

    def update(self) -> None:
        """Unscale, clip, step."""
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """SimpleTrainer's, with the loss scaler and the momenta's measurement where there are any."""
        state = super().state_dict()
        if self.scaler.is_enabled():
            state["grad_scaler"] = self.scaler.state_dict()
        if self.auto_momenta is not None:
            state["auto_momenta"] = self.auto_momenta.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if "grad_scaler" in state_dict:  # absent where the run was begun without float16: it starts afresh
            self.scaler.load_state_dict(state_dict["grad_scaler"])
        if self.auto_momenta is not None and "auto_momenta" in state_dict:
            self.auto_momenta.load_state_dict(state_dict["auto_momenta"])


def stream_losses(losses: Mapping[str, Tensor], streams: Mapping[str, str]) -> dict[str, Tensor]:
    """The summed loss of every stream: `loss_kd_<term>[_stage<k>]` to the term's stream, all other losses to `tog`.

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
    if solver.OPTIMIZER == "sgd" and not solver.AMP.ENABLED and solver.ACCUMULATE_STEPS == 1 and clip is None:
        return SimpleTrainer(model, data_loader, optimizer)
    if solver.AMP.ENABLED:
        pool_in_float32(plain)
    loss = getattr(plain, "loss", None)
    return StreamTrainer(
        model,
        data_loader,
        optimizer,
        loss.streams if loss is not None else {},
        accumulate_steps=solver.ACCUMULATE_STEPS,
        dtype=getattr(torch, solver.AMP.DTYPE) if solver.AMP.ENABLED else None,
        clip=clip,
        auto_momenta=build_auto_momenta(solver, optimizer, plain.named_parameters()),
    )


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
