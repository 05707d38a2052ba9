"""SGD whose gradient arrives in streams, each with its own momentum."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.distributed import local
from kd_core.optim.base import MOMENTA, StreamOptimizer, label, local_gradient, run_closure
from kd_core.optim.sgd_kernels import sgd_

STEPS = ("paper", "matched")


class StreamSGD(StreamOptimizer):
    """SGD with a momentum for every stream of gradients (DeepKD, arXiv 2505.15133; DOT, ICCV 2023).

    For each set of streams of equal momentum m::

        g ← Σ_streams g  (+ weight_decay · θ in the decay stream's set)
        v ← m · v + g
        θ ← θ − lr · s · v              with nesterov: θ ← θ − lr · s · (g + m · v)

    `step="paper"`: s = 1; momentum .975 then takes steps, lr / (1 − m), four times as large as .9. `step="matched"`
    (ours): s = (1 − m) / (1 − base_momentum), so that a learning rate tuned for plain SGD of that momentum still holds.

    One stream, or equal momenta, is `torch.optim.SGD`. A stream that does not reach a parameter counts as g = 0 there;
    a parameter that no stream reaches is left alone, as SGD leaves `grad is None`. All values may differ by group.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, ≥ 0.
        momenta: {stream: momentum in [0, 1)}.
        weight_decay: L2 penalty, applied once for every parameter, through `decay_stream`.
        decay_stream: by default "tog", or the first stream where there is no "tog".
        nesterov: as in `torch.optim.SGD`, for each set.
        step: "paper" or "matched".
        base_momentum: the μ of step="matched".
    Raises:
        ValueError: a value out of its range; an unknown `decay_stream`; a stream missing from a group's momenta.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momenta: Mapping[str, float],
        weight_decay: float = 0.0,
        decay_stream: str | None = None,
        nesterov: bool = False,
        step: str = "paper",
        base_momentum: float = 0.9,
    ) -> None:
        if decay_stream is None:
            decay_stream = "tog" if "tog" in momenta else next(iter(momenta), None)
        defaults = {
            "lr": lr,
            MOMENTA: dict(momenta),
            "weight_decay": weight_decay,
            "decay_stream": decay_stream,
            "nesterov": nesterov,
            "step": step,
            "base_momentum": base_momentum,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if group["decay_stream"] not in group[MOMENTA]:
            streams = ", ".join(group[MOMENTA])
            raise ValueError(f"decay_stream is {group['decay_stream']!r}: it must be one of {streams}")
        if group["step"] not in STEPS:
            raise ValueError(f"step is {group['step']!r}: it must be 'paper' or 'matched'")
        if not 0 <= group["base_momentum"] < 1:
            raise ValueError(f"base_momentum is {group['base_momentum']}: it must be in [0, 1)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that a stream reached. Under a GradScaler call `scaler.step(optimizer)`."""
        loss = run_closure(closure)
        sets = self._gradients_for_step()
        for group in self.param_groups:
            columns = [(streams, [gradient.get(p) for p in group["params"]]) for streams, gradient in sets]
            reached = [any(g is not None for g in row) for row in zip(*(grads for _, grads in columns), strict=True)]
            # The decay stream's set goes first: it reads θ, and every set moves θ.
            for streams, grads in sorted(columns, key=lambda column: group["decay_stream"] not in column[0]):
                self._step_set(group, reached, streams, grads)
        return loss

    def _step_set(
        self, group: dict[str, Any], reached: list[bool], streams: tuple[str, ...], gradients: list[Tensor | None]
    ) -> None:
        momentum, name = group[MOMENTA][streams[0]], label(streams)
        decay = group["weight_decay"] if group["decay_stream"] in streams else 0.0
        scale = (1 - momentum) / (1 - group["base_momentum"]) if group["step"] == "matched" else 1.0
        params, grads, buffers = [], [], []
        for p, g, is_reached in zip(group["params"], gradients, reached, strict=True):
            if not is_reached:
                continue
            v = self._buffer(p, name, create=momentum != 0 and (g is not None or decay != 0))
            if g is None and v is None and decay == 0:
                continue  # v is 0, and stays 0
            params.append(local(p))
            grads.append(torch.zeros_like(params[-1]) if g is None else local_gradient(p, g))
            buffers.append(v if v is None else local(v))
        lr, found_inf = group["lr"] * scale, getattr(self, "found_inf", None)
        if momentum == 0:  # what an earlier momentum has left must not come back with a later one
            follow_gradient_(params, grads, buffers, decay, found_inf)
        sgd_(params, grads, buffers if momentum != 0 else None, lr, momentum, decay, group["nesterov"], found_inf)


def follow_gradient_(
    params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None], decay: float, found_inf: Tensor | None
) -> None:
    """`v ← 0·v + (g + wd·θ)` where there is a v; not where `found_inf` is not 0."""
    for p, g, v in zip(params, grads, buffers, strict=True):
        if v is not None:
            now = g.add(p, alpha=decay)
            v.copy_(now if found_inf is None else torch.where(found_inf.to(v.device) != 0, v, now))
