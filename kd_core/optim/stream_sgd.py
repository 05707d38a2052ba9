"""SGD whose gradient arrives in streams, each with its own momentum."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.optim.base import MOMENTA, StreamOptimizer, closure_loss, label

STEPS = ("paper", "matched")


class StreamSGD(StreamOptimizer):
    """SGD with a momentum for every stream of gradients (DeepKD, arXiv 2505.15133; DOT, ICCV 2023).

    For each set of streams of equal momentum m::

        g ← Σ_streams g  (+ weight_decay · θ in the decay stream's set)
        v ← m · v + g
        θ ← θ − lr · s · v              with nesterov: θ ← θ − lr · s · (g + m · v)

    `step="paper"`: s = 1. Then momentum .975 takes steps lr / (1 − m) that are four times those of .9. `step="matched"` (ours):
    s = (1 − m) / (1 − base_momentum), so a learning rate found for plain SGD with `base_momentum` still holds.

    One stream, or equal momenta, is `torch.optim.SGD`. A stream that does not reach a parameter counts as g = 0 there; a
    parameter that no stream reaches is left alone, as SGD leaves `grad is None` alone. Any hyperparameter may differ by group.

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
        ValueError: a value out of its range, `decay_stream` not among the streams, a stream missing from a group's momenta.
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
            raise ValueError(
                f"decay_stream is {group['decay_stream']!r}: it must be one of {', '.join(group[MOMENTA])}"
            )
        if group["step"] not in STEPS:
            raise ValueError(f"step is {group['step']!r}: it must be 'paper' or 'matched'")
        if not 0 <= group["base_momentum"] < 1:
            raise ValueError(f"base_momentum is {group['base_momentum']}: it must be in [0, 1)")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that a stream reached. Under a GradScaler call `scaler.step(optimizer)`."""
        loss = closure_loss(closure)
        sets, gradients = self._gradients_for_step()
        for group in self.param_groups:
            reached = [p for p in group["params"] if any(p in gradient for gradient in gradients)]
            # The decay stream's set comes first: it reads θ, which every set moves.
            for streams, gradient in sorted(
                zip(sets, gradients, strict=True), key=lambda each: group["decay_stream"] not in each[0]
            ):
                self._step_set(group, reached, streams, gradient)
        return loss

    def _step_set(
        self, group: dict[str, Any], reached: list[Tensor], streams: tuple[str, ...], gradient: dict[Tensor, Tensor]
    ) -> None:
        momentum, name = group[MOMENTA][streams[0]], label(streams)
        decay = group["weight_decay"] if group["decay_stream"] in streams else 0.0
        scale = (1 - momentum) / (1 - group["base_momentum"]) if group["step"] == "matched" else 1.0
        params, grads, buffers = [], [], []
        for p in reached:
            g, buffers_of_p = gradient.get(p), self.state[p].setdefault(self.BUFFERS, {})
            if g is None and name not in buffers_of_p and decay == 0:
                continue  # v is 0 and stays 0
            if momentum != 0 and name not in buffers_of_p:
                buffers_of_p[name] = torch.zeros_like(p)
            params.append(p)
            grads.append(torch.zeros_like(p) if g is None else g)
            buffers.append(buffers_of_p[name] if momentum != 0 else None)
        sgd_(
            params,
            grads,
            buffers,
            group["lr"] * scale,
            momentum,
            decay,
            group["nesterov"],
            getattr(self, "found_inf", None),
        )


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    found_inf: Tensor | None = None,
) -> None:
    """`v ← m·v + (g + wd·θ)`, `θ ← θ − lr·v`, in one kernel where there is one for these tensors, else by foreach.

    Args:
        found_inf: not 0 leaves everything as it is.
    """
    lists: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor], list[Tensor | None]]] = {}
    for p, g, v in zip(params, grads, buffers, strict=True):
        # The CPU kernel reads memory in order and does not look at strides: a differing layout would be silently wrong.
        fused = _has_fused_kernel(p) and p.stride() == g.stride() and (v is None or p.stride() == v.stride())
        for whole, part in zip(lists.setdefault((fused, p.device, p.dtype), ([], [], [])), (p, g, v), strict=True):
            whole.append(part)
    for (fused, device, _), (ps, gs, vs) in lists.items():
        inf = None if found_inf is None else found_inf.to(device)
        if fused:
            _fused_sgd_(ps, gs, vs, lr, momentum, weight_decay, nesterov, inf)
        elif inf is None or inf.item() == 0:
            _foreach_sgd_(ps, gs, vs, float(lr), momentum, weight_decay, nesterov)


def _has_fused_kernel(p: Tensor) -> bool:
    return p.device.type in ("cpu", "cuda") and p.is_floating_point() and hasattr(torch, "_fused_sgd_")


def _fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    found_inf: Tensor | None,
) -> None:
    torch._fused_sgd_(
        params,
        grads,
        buffers if momentum != 0 else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        is_first_step=False,  # buffers start at 0, which comes to the same
        found_inf=found_inf,
    )


def _foreach_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    if weight_decay != 0:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    if momentum != 0:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = torch._foreach_add(grads, buffers, alpha=momentum) if nesterov else buffers
    torch._foreach_add_(params, grads, alpha=-lr)
