"""One optimizer step over gradient streams, as both engines make it: from the losses to the updated weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kd_core.optim.gsnr import AutoMomenta
from kd_core.streams import backward_streams


class TrainStep:
    """`backward` adds up the gradients of a step's micro-batches; `optimizer_step` unscales, clips and steps.

    Gradients stay until the next `backward`, so that they can be logged after the step.

    Args:
        optimizer: a stream optimizer, or any of torch's, which takes all streams as one.
        dtype: of the engine's autocast. float16 needs a loss scaler: an infinity in any stream skips the whole step.
        clip: clips the optimizer's gradients, complete and unscaled; None for no clipping.
        auto_momenta: sets the optimizer's momenta from the GSNR of each step's first micro-batch; None for fixed ones.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        dtype: torch.dtype | None = None,
        clip: Callable[[], object] | None = None,
        auto_momenta: AutoMomenta | None = None,
    ) -> None:
        self.optimizer, self.dtype, self.clip, self.auto_momenta = optimizer, dtype, clip, auto_momenta
        self.device = optimizer.param_groups[0]["params"][0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype is torch.float16)

    def backward(
        self,
        micro_batches: Sequence[Any],
        losses_of: Callable[[Any], Mapping[str, Tensor]],
        iteration: int,
        weight: float = 1.0,
    ) -> None:
        """Compute the gradients of one step; they are averaged over the processes with the last micro-batch.

        Args:
            micro_batches: at least one.
            losses_of: maps a micro-batch to {stream: loss}. Its forward pass reduces no gradients (`no_sync()`).
            iteration: number of the step, from 0.
            weight: factor of every micro-batch's losses. GSNR is measured without it.
        """
        self.optimizer.zero_grad()
        for number, micro_batch in enumerate(micro_batches, 1):
            losses = losses_of(micro_batch)
            if number == 1 and self.auto_momenta is not None:
                scale = self.scaler.scale(torch.ones((), device=self.device))  # get_scale() would wait for the device
                self.auto_momenta.observe(losses, iteration, scale)
            if weight != 1:
                losses = {stream: loss * weight for stream, loss in losses.items()}
            backward_streams(losses, self.optimizer, self.scaler, sync=number == len(micro_batches))

    def optimizer_step(self) -> None:
        """Unscale, clip and step."""
        self.scaler.unscale_(self.optimizer)
        if self.clip is not None:
            self.clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, scaler ({} where losses are not scaled) and auto_momenta (None where momenta are fixed)."""
        auto = None if self.auto_momenta is None else self.auto_momenta.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "auto_momenta": auto}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Scaler and momenta start afresh where the state has none: it was saved by a run without them."""
        self.optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])
        if self.auto_momenta is not None and state.get("auto_momenta"):
            self.auto_momenta.load_state_dict(state["auto_momenta"])


def clip_gradients(optimizer: Optimizer, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale all streams by one factor, or `p.grad` where there are no streams, to a norm of at most `max_norm`.

    Returns:
        The norm before; the host does not wait for it.
    """
    if hasattr(optimizer, "clip_grad_norm_"):
        return optimizer.clip_grad_norm_(max_norm, norm_type)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type)
