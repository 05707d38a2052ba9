"""One step of SGD with momentum on lists of tensors: torch's fused kernel where it is right, else foreach."""

from typing import Any

import torch
from torch import Tensor

Lists = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    found_inf: Tensor | None = None,
) -> None:
    """`v ← m·v + (g + wd·θ)`, then `θ ← θ − lr·v`, or `θ ← θ − lr·(g + wd·θ + m·v)` with nesterov.

    Args:
        params, grads, buffers: θ, g, v. Without buffers the momentum is 0.
        found_inf: a scalar; where it is not 0, nothing changes.
    """
    for (fused, device, _), lists in _by_kernel(params, grads, buffers).items():
        skip = None if found_inf is None else found_inf.to(device)
        if fused:
            fused_sgd_(*lists, lr, momentum, weight_decay, nesterov, skip)
        elif skip is None or skip.item() == 0:
            foreach_sgd_(*lists, lr, momentum, weight_decay, nesterov)


def _by_kernel(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor] | None) -> dict[tuple[Any, ...], Lists]:
    """The lists, split by (whether the fused kernel is right, device, dtype)."""
    # The fused CPU kernel ignores strides: where layouts differ it would pair the wrong elements, silently.
    alike = [
        p.stride() == g.stride() == v.stride() or (same_layout(p, g) and same_layout(p, v))
        for p, g, v in zip(params, grads, buffers or grads, strict=True)
    ]
    kinds = [(p.device, p.dtype) for p in params]
    if all(alike) and len(set(kinds)) == 1:
        return {(has_fused_kernel(params[0]), *kinds[0]): (params, grads, buffers)}
    split: dict[tuple[Any, ...], Lists] = {}
    for i, kind in enumerate(kinds):
        key = (alike[i] and has_fused_kernel(params[i]), *kind)
        lists = split.setdefault(key, ([], [], None if buffers is None else []))
        for whole, part in zip((params, grads, buffers), lists, strict=True):
            if whole is not None:
                part.append(whole[i])
    return split


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether the elements of two tensors of one shape lie in the same order; sides of 1 do not matter."""
    if a.stride() == b.stride():
        return True
    return all(s == t or n == 1 for s, t, n in zip(a.stride(), b.stride(), a.shape, strict=True))


def has_fused_kernel(p: Tensor) -> bool:
    return p.device.type in ("cpu", "cuda") and p.is_floating_point()


def fused_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    found_inf: Tensor | None = None,
) -> None:
    """`sgd_` in one pass over memory, for tensors of one device, dtype and layout."""
    torch._fused_sgd_(
        params,
        grads,
        buffers or [],
        weight_decay=weight_decay,
        momentum=momentum if buffers else 0.0,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov and bool(buffers),
        maximize=False,
        is_first_step=False,  # the buffers are there, and start at 0
        found_inf=found_inf,
    )


def foreach_sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor] | None,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """`sgd_` for any tensors."""
    if weight_decay != 0:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    if buffers is not None:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads)
        grads = torch._foreach_add(grads, buffers, alpha=momentum) if nesterov else buffers
    if isinstance(lr, Tensor):  # which the host does not read
        torch._foreach_sub_(params, torch._foreach_mul(grads, lr))
    else:
        torch._foreach_add_(params, grads, alpha=-lr)
