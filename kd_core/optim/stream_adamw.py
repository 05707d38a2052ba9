"""AdamW whose gradient arrives in streams, each with its own first moment."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.distributed import local
from kd_core.optim.base import BUFFERS, MOMENTA, StreamOptimizer, label, local_gradient, run_closure

STEP = "step"
SECOND = "exp_avg_sq"


class StreamAdamW(StreamOptimizer):
    """AdamW with a first-moment decay for every stream of gradients. It is ours: no paper has it.

    With t the parameter's steps, G the sum of all streams, and b the momentum (Adam's β₁) of a set of streams::

        θ ← θ − lr · weight_decay · θ
        m ← b · m + (1 − b) · Σ_streams g                             one buffer per set
        s ← β₂ · s + (1 − β₂) · G²                                    one buffer for all
        θ ← θ − lr · Σ_sets m / (1 − bᵗ) / (√(s / (1 − β₂ᵗ)) + ε)

    One second moment for all keeps the streams' proportions, and makes one stream, or equal momenta,
    `torch.optim.AdamW`. Unlike SGD's, its steps do not grow with the momentum. Decay is decoupled, and of no stream.

    Args:
        params: parameters, or groups of them; every value may differ by group.
        lr: learning rate, ≥ 0.
        momenta: {stream: β₁ in [0, 1)}.
        beta2: decay of the second moment, in [0, 1).
        eps: ε > 0.
        weight_decay: ≥ 0.
    Raises:
        ValueError: a value out of its range; a stream missing from a group's momenta.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momenta: Mapping[str, float] | None = None,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        defaults = {"lr": lr, MOMENTA: dict(momenta or {}), "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        super()._check_group(group)
        if not 0 <= group["beta2"] < 1:
            raise ValueError(f"beta2 is {group['beta2']}: it must be in [0, 1)")
        if not group["eps"] > 0:
            raise ValueError(f"eps is {group['eps']}: it must be > 0")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that a stream reached. Under a GradScaler call `scaler.step(optimizer)`."""
        loss = run_closure(closure)
        sets = self._gradients_for_step()
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and float(found_inf) != 0:  # the number 0 where no parameter had a gradient
            return loss
        for group in self.param_groups:
            # Bias correction needs the number of steps, which differs for parameters that joined late.
            by_steps: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None and any(p in gradient for _, gradient in sets):
                    by_steps.setdefault(self._count_step(p), []).append(p)
            for steps, params in by_steps.items():
                self._step_params(group, steps, params, sets)
        return loss

    def _count_step(self, p: Tensor) -> int:
        state = self.state[p]
        if not state:
            state.update({STEP: torch.zeros(()), SECOND: torch.zeros_like(p), BUFFERS: {}})
        state[STEP] += 1
        return int(state[STEP])

    def _step_params(
        self,
        group: dict[str, Any],
        steps: int,
        params: list[Tensor],
        sets: list[tuple[tuple[str, ...], dict[Tensor, Tensor]]],
    ) -> None:
        lr, beta2 = float(group["lr"]), group["beta2"]
        sums, seconds = [local_gradient(p, p.grad) for p in params], [local(self.state[p][SECOND]) for p in params]
        torch._foreach_mul_([local(p) for p in params], 1 - lr * group["weight_decay"])
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, sums, sums, value=1 - beta2)
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_div_(roots, (1 - beta2**steps) ** 0.5)
        torch._foreach_add_(roots, group["eps"])
        root_of = dict(zip(params, roots, strict=True))
        for streams, gradient in sets:
            beta1, name = group[MOMENTA][streams[0]], label(streams)
            moving = [p for p in params if p in gradient or name in self.state[p][BUFFERS]]
            if not moving:
                continue
            firsts = [local(self._buffer(p, name)) for p in moving]
            grads = [
                local_gradient(p, gradient[p]) if p in gradient else torch.zeros_like(first)
                for p, first in zip(moving, firsts, strict=True)
            ]
            torch._foreach_lerp_(firsts, grads, 1 - beta1)
            weights, roots = [local(p) for p in moving], [root_of[p] for p in moving]
            torch._foreach_addcdiv_(weights, firsts, roots, value=-lr / (1 - beta1**steps))
