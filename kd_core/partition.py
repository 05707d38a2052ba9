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

from kd_core.partition_blocks import Group, KLWeights, block_gradient, compare, find_neg_inf, split

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
        A logit of −inf is a probability of 0, and 0 · log(0 / q) is 0. A group that the teacher leaves empty adds 0.
        Where the student has 0 and the teacher has not, forward KL is +inf; reverse KL is where it is the other way.
    """
    flat = (tensor for group in groups for tensor in group)
    mass, log_mass_student, log_mass_teacher, *within = _Decompose.apply(
        student_logits, teacher_logits, float(temperature), KL_TYPES[kl], *flat
    )
    return Decomposition(mass, tuple(within), log_mass_student, log_mass_teacher)


class _Decompose(torch.autograd.Function):
    """`decompose` in one pass, with the closed-form gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        kl: KLWeights,
        *groups: Tensor | None,
    ) -> tuple[Tensor, ...]:
        pairs = [Group(index, valid) for index, valid in zip(groups[::2], groups[1::2], strict=True)]
        blocks = [compare(*block, kl) for block in split(student, teacher, pairs, temperature)]
        within, largest, log_peaks = torch.stack([block.rows for block in blocks]).split([1, 2, 2], 1)  # (G, 1 or 2, N)
        # Relative to the row's largest logit, so that a row far from 0 loses no digits.
        log_mass = (largest - largest.amax(0)).sub_(log_peaks)
        # Side by side, since a vectorised exponential depends on the place in memory: equal sides must stay equal.
        log_mass_student, log_mass_teacher = (side.log_softmax(0) for side in log_mass.unbind(1))
        mass_student, mass_teacher = log_mass_student.exp(), log_mass_teacher.exp()
        mass = mass_teacher * (log_mass_teacher - log_mass_student)
        within, empty = within[:, 0], find_neg_inf(largest[:, 1])
        if empty is not None:
            mass, within = mass.masked_fill_(mass_teacher == 0, 0.0), within.masked_fill(empty, 0.0)  # 0 · log 0 is 0
        mass = mass.sum(0).clamp_min_(0)
        kept = (tensor for block in blocks for tensor in block[:3])
        ctx.save_for_backward(mass_student, mass_teacher, empty, *groups, *kept)
        ctx.temperature, ctx.kl, ctx.dtype, ctx.num_groups = temperature, kl, student.dtype, len(pairs)
        ctx.mark_non_differentiable(log_mass_teacher)
        ctx.set_materialize_grads(False)  # a stream that leaves a part out costs no pass over it
        return mass, log_mass_student, log_mass_teacher, *within

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_mass: Tensor | None, grad_log_mass: Tensor | None, _: None, *grad_within: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mass_student, mass_teacher, empty, *saved = ctx.saved_tensors
        groups, kept = saved[: 2 * ctx.num_groups], saved[2 * ctx.num_groups :]
        scale = 1 / ctx.temperature  # du/dz
        slope = torch.zeros_like(mass_student)
        if grad_mass is not None:
            slope = (mass_student - mass_teacher) * (grad_mass * scale)
        if grad_log_mass is not None:
            slope = slope + (grad_log_mass - mass_student * grad_log_mass.sum(0)) * scale
        grads = [None if grad is None else grad * scale for grad in grad_within]
        if empty is not None:
            pairs = zip(grads, empty, strict=True)
            grads = [None if grad is None else grad.masked_fill_(is_empty, 0.0) for grad, is_empty in pairs]
        *listed, gradient = (
            block_gradient(kept[3 * g : 3 * g + 3], ctx.kl, slope[g], grad) for g, grad in enumerate(grads)
        )
        for index, block in zip(groups[::2], listed, strict=True):
            gradient.scatter_add_(1, index, block)  # 0 there so far; an entry that does not count adds 0
        return gradient.to(ctx.dtype), None, None, None, *(None for _ in groups)
