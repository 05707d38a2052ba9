"""The algebra of a class partition, in log space: masses, conditional distributions and their KL divergences.

Cut the C classes of a row into groups g. A softmax p then splits into the masses M_g = Σ_{i∈g} p_i and, within each
group, the conditional distribution p̂_i = p_i / M_g, and its divergence splits exactly:

    KL(p^T || p^S) = KL(M^T || M^S) + Σ_g M_g^T · KL(p̂^T || p̂^S within g)

DKD is the partition target | rest (arXiv 2203.08679, section 3), GDKD is top-k | rest (arXiv 2512.04625). Every loss
of `kd_core.losses` weights these parts. With u = z/T their gradients are closed forms, so one pass computes them all:

    ∂ KL(M^T || M^S)          / ∂u_i = p̂_i^S · (M_g^S − M_g^T)             i ∈ g
    ∂ KL(p̂^T || p̂^S within g) / ∂u_i = p̂_i^S − p̂_i^T                        i ∈ g, else 0     (forward)
    ∂ KL(p̂^S || p̂^T within g) / ∂u_i = p̂_i^S · (log(p̂_i^S / p̂_i^T) − KL)    i ∈ g, else 0     (reverse)
    ∂ log M_h                 / ∂u_i = p̂_i^S · ([g = h] − M_g^S)           i ∈ g
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kd_core.partition_blocks import Group, KLWeights, Sides, block_gradient, compare, work_dtype

# Logits from here on are large: 2 MB a buffer in float32.
LARGE = 2**19

KL_TYPES = {"forward": KLWeights(1.0, 0.0), "reverse": KLWeights(0.0, 1.0), "both": KLWeights(0.5, 0.5)}


class Decomposition(NamedTuple):
    """The parts of KL(teacher || student) under a partition of G groups; the last group is the rest.

    mass: (N,) KL(M^T || M^S).
    within: G tensors (N,), the divergence inside each group; a group of one class has 0.
    log_mass_student, log_mass_teacher: (G, N). The student's is differentiable.
    """

    mass: Tensor
    within: tuple[Tensor, ...]
    log_mass_student: Tensor
    log_mass_teacher: Tensor


def decompose(
    student_logits: Tensor,
    teacher_logits: Tensor,
    groups: Sequence[Group] = (),
    temperature: float = 1.0,
    kl: str = "forward",
) -> Decomposition:
    """Split the divergence of two (N, C) logit tensors by a partition of the classes.

    Args:
        student_logits: (N, C), any floating type.
        teacher_logits: (N, C); no gradient flows into it.
        groups: disjoint groups. The classes in none of them are one more group, the rest; no row may be without any.
        temperature: T; both sides are softmax(z / T). Nothing is multiplied by T² here.
        kl: "forward" KL(T||S), "reverse" KL(S||T), or "both" (their mean), for the divergences within groups.

    Returns:
        The parts row by row, at least float32; each may be backpropagated alone. Finite for |z| up to 1e30: the maximum
        of a group is taken out before any exponential, and no logarithm is taken of a probability that can be 0.
    """
    flat = (tensor for group in groups for tensor in group)
    mass, log_mass_student, log_mass_teacher, *within = _Decompose.apply(
        student_logits, teacher_logits, float(temperature), KL_TYPES[kl], *flat
    )
    return Decomposition(mass, tuple(within), log_mass_student, log_mass_teacher)


class _Decompose(torch.autograd.Function):
    """`decompose`, with the closed-form gradients of the module's docstring.

    Large logits are worked on in two pieces, and of them only p̂^S is kept for the backward pass, where the teacher's
    softmax is computed again: the peak stays well below that of a log_softmax and a softmax under autograd. Where the
    logits are small, time counts for more, and both softmaxes are kept.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        kl: KLWeights,
        *groups: Tensor | None,
    ) -> tuple[Tensor, ...]:
        large = student.numel() >= LARGE
        p_student = torch.empty_like(student, dtype=work_dtype(student, teacher)) if large else None
        statistics = []
        for rows in _pieces(student):
            sides = Sides(student[rows], teacher[rows], _groups(groups, rows), temperature)
            outs = [*(None for _ in sides.groups), None if p_student is None else p_student[rows]]
            blocks = [
                compare(sides.block(g, 0), sides.block(g, 1), sides.void(g), kl, out) for g, out in enumerate(outs)
            ]
            statistics.append(torch.stack([block.rows for block in blocks]))
        softmaxes = (p_student, None) if large else (blocks[-1].p_student, blocks[-1].p_teacher)
        within, largest, log_peaks = torch.cat(statistics, 2).split([1, 2, 2], 1)  # (G, 1 or 2, N)
        # Relative to the row's largest logit, so that a row far from 0 loses no digits.
        log_mass = (largest - largest.amax(0)).sub_(log_peaks).log_softmax(0)
        log_mass_student, log_mass_teacher = log_mass.unbind(1)
        mass_student, mass_teacher = log_mass.exp().unbind(1)
        mass = (mass_teacher * (log_mass_teacher - log_mass_student)).sum(0).clamp_min_(0)
        ctx.save_for_backward(student, teacher, *softmaxes, mass_student, mass_teacher, *groups)
        ctx.temperature, ctx.kl = temperature, kl
        ctx.mark_non_differentiable(log_mass_teacher)
        ctx.set_materialize_grads(False)  # a stream that leaves a part out costs no pass over it
        return mass, log_mass_student, log_mass_teacher, *within[:, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_mass: Tensor | None, grad_log_mass: Tensor | None, _: None, *grad_within: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        student, teacher, p_student, p_teacher, mass_student, mass_teacher, *groups = ctx.saved_tensors
        scale = 1 / ctx.temperature  # du/dz
        slope = torch.zeros_like(mass_student)
        if grad_mass is not None:
            slope = (mass_student - mass_teacher) * (grad_mass * scale)
        if grad_log_mass is not None:
            slope = slope + (grad_log_mass - mass_student * grad_log_mass.sum(0)) * scale
        grads = [None if grad is None else (grad * scale)[:, None] for grad in grad_within]
        gradient = torch.empty_like(p_student)
        for rows in _pieces(student):
            sides = Sides(student[rows], teacher[rows], _groups(groups, rows), ctx.temperature)
            softmaxes = p_student[rows], None if p_teacher is None else p_teacher[rows]
            parts = [None if grad is None else grad[rows] for grad in grads]
            _write_gradient(sides, softmaxes, ctx.kl, slope[:, rows, None], parts, gradient[rows])
        return gradient.to(student.dtype), None, None, None, *(None for _ in groups)


def _write_gradient(
    sides: Sides,
    softmaxes: tuple[Tensor, Tensor | None],
    kl: KLWeights,
    slope: Tensor,
    grads: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    """Write the gradient of some rows to `out` (N, C). softmaxes: those of the rest; slope: (G, N, 1)."""
    rest = len(sides.groups)
    block_gradient(sides, rest, *softmaxes, kl, slope[rest], grads[rest], out)
    for g, (index, _) in enumerate(sides.groups):
        block = slope[g]  # all there is to it for one class
        if index.shape[1] > 1:
            block = block_gradient(sides, g, sides.block(g, 0).softmax(1), None, kl, slope[g], grads[g])
        out.scatter_add_(1, index, block)  # 0 there so far; an entry that does not count adds 0


def _pieces(logits: Tensor) -> list[slice]:
    """The rows, in two pieces where the logits are large."""
    rows = len(logits)
    if logits.numel() < LARGE:
        return [slice(0, rows)]
    return [slice(0, rows // 2), slice(rows // 2, rows)]


def _groups(tensors: Sequence[Tensor | None], rows: slice) -> list[Group]:
    """The groups of some rows out of index, valid, index, valid …"""
    cut = [None if tensor is None else tensor[rows] for tensor in tensors]
    return [Group(index, valid) for index, valid in zip(cut[::2], cut[1::2], strict=True)]
