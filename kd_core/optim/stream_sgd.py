"""SGD whose gradient arrives in streams, each with its own momentum."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.optim.base import BUFFERS, MOMENTA, StreamOptimizer, label, run_closure
from kd_core.optim.sgd_kernels import sgd_

STEPS = ("paper", "matched")


class StreamSGD(StreamOptimizer):
    """SGD with a momentum for every stream of gradients (DeepKD, arXiv 2505.15133; DOT, ICCV 2023).

    For each set of streams of equal momentum m::

        g ← Σ_streams g  (+ weight_decay · θ in the decay stream's set)
        v ← m · v + g
        θ ← θ − lr · s · v              with nesterov: θ ← θ − lr · s · (g + m · v)

    `step="paper"`: s = 1; momentum .975 then takes steps, lr / (1 − m), four times those of .9. `step="matched"`
    (ours): s = (1 − m) / (1 − base_momentum), so that a learning rate found for plain SGD of that momentum still holds.

    One stream, or equal momenta, is `torch.optim.SGD`. A stream that does not reach a parameter counts as g = 0 there;
    a parameter that no stream reaches is left alone, as SGD leaves `grad is None`. All values may differ by group.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, ≥ 0.
        momenta: {stream: momentum in [0, 1)}.
        weight_decay: L2 penalty, applied once for every parameter, through `decay_stream`.
        decay_stream: by default the first stream of `momenta`.
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
        defaults = {
            "lr": lr,
            MOMENTA: dict(momenta),
            "weight_decay": weight_decay,
            "decay_stream": next(iter(momenta), None) if decay_stream is None else decay_stream,
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
            reached = [p for p in group["params"] if any(p in gradient for _, gradient in sets)]
            # The decay stream's set goes first: it reads θ, and every set moves θ.
            for streams, gradient in sorted(sets, key=lambda each: group["decay_stream"] not in each[0]):
                self._step_set(group, reached, streams, gradient)
        return loss

    def _step_set(
        self, group: dict[str, Any], reached: list[Tensor], streams: tuple[str, ...], gradient: dict[Tensor, Tensor]
    ) -> None:
        momentum = group[MOMENTA][streams[0]]
        decay = group["weight_decay"] if group["decay_stream"] in streams else 0.0
        scale = (1 - momentum) / (1 - group["base_momentum"]) if group["step"] == "matched" else 1.0
        name = label(streams)
        # Where there is no gradient, decay or buffer, v is 0 and stays 0.
        params = [p for p in reached if p in gradient or decay != 0 or name in self.state[p].get(BUFFERS, {})]
        grads = [gradient[p] if p in gradient else torch.zeros_like(p) for p in params]
        buffers = [self._buffer(p, name) for p in params] if momentum != 0 else None
        lr, found_inf = group["lr"] * scale, getattr(self, "found_inf", None)
        sgd_(params, grads, buffers, lr, momentum, decay, group["nesterov"], found_inf)
