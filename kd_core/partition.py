"""The algebra of a class partition, in log space: masses, conditional distributions and their KL divergences.

Cut the C classes of a row into groups g. A softmax p then splits into the masses M_g = Σ_{i∈g} p_i and, within each group, the
conditional distribution p̂_i = p_i / M_g, and its divergence splits exactly:

    KL(p^T || p^S) = KL(M^T || M^S) + Σ_g M_g^T · KL(p̂^T || p̂^S within g)

DKD is the partition {target} | rest (arXiv 2203.08679, section 3), GDKD is top-k | rest (arXiv 2512.04625). Every loss of
`kd_core.losses` is a weighting of these parts. With u = z/T the gradients are closed forms, which is what makes one fused pass possible:

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

# Weights of the forward KL(T||S) and of the reverse KL(S||T) within a group. The divergence of the masses is always forward.
KL_TYPES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "both": (0.5, 0.5)}


class Group(NamedTuple):
    """Classes of one group, row by row.

    index: (N, K) class indices, no class twice in a row.
    valid: (N, K) bool where rows have different sizes: entries that are False repeat a valid class of the row and do not count.
    """

    index: Tensor
    valid: Tensor | None = None


class Decomposition(NamedTuple):
    """The parts of KL(teacher || student) under a partition of G groups; the last group is the rest.

    mass: (N,) KL(M^T || M^S).
    within: G tensors (N,), the divergence inside each group; a group of one class has 0.
    log_mass_student, log_mass_teacher: (N, G). The student's is differentiable.
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
        groups: disjoint groups. All classes in none of them are one more group, the rest, which must not be empty in any row.
        temperature: T; both sides are softmax(z / T). Nothing is multiplied by T² here.
        kl: "forward" KL(T||S), "reverse" KL(S||T), or "both" (their mean), for the divergences within groups.

    Returns:
        Per-row parts, at least float32. Every part may be backpropagated alone. Finite for |z| up to 1e30: no probability is
        ever formed without its group's maximum taken out, and no logarithm of a probability is taken.
    """
    flat = (tensor for group in groups for tensor in group)
    mass, log_mass_student, log_mass_teacher, *within = _Decompose.apply(
        student_logits, teacher_logits, float(temperature), KL_TYPES[kl], *flat
    )
    return Decomposition(mass, tuple(within), log_mass_student, log_mass_teacher)


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype losses are computed in: float64 where one side is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Block(NamedTuple):
    """One group on both sides. Softmaxes (N, K); row statistics (N,)."""

    student: Tensor  # p̂^S
    teacher: Tensor  # p̂^T
    centred_log_ratio: Tensor | None  # log(p̂^S / p̂^T) − KL(p̂^S || p̂^T), kept for the reverse gradient only
    within: Tensor
    maxima: tuple[Tensor, Tensor]  # largest logit of the group: student, teacher
    log_sums: tuple[Tensor, Tensor]  # log Σ exp(logit − maximum): student, teacher


def _single_class(student: Tensor, teacher: Tensor) -> _Block:
    """The block of a one-class group: its distribution is (1) on both sides."""
    ones, zeros = torch.ones_like(student), torch.zeros_like(student[:, 0])
    return _Block(ones, ones, None, zeros, (student[:, 0], teacher[:, 0]), (zeros, zeros))


def _compare(student: Tensor, teacher: Tensor, kl: tuple[float, float], void: Tensor | None = None) -> _Block:
    """Compare two (N, K) blocks of logits, which are overwritten: three buffers of that size are alive at most (forward KL).

    void: where both sides are −inf, a class of another group: column indices (N, V), or a mask (N, K).
    """
    if student.shape[1] == 1:
        return _single_class(student, teacher)
    maxima = student.amax(1), teacher.amax(1)
    student.sub_(maxima[0][:, None])
    teacher.sub_(maxima[1][:, None])
    p_teacher = teacher.softmax(1)
    log_sum_teacher = -p_teacher.amax(1).log_()  # the largest logit is 0 now, so max p̂ = 1 / Σ exp
    log_ratio = _clear(teacher.sub_(student), void)  # log(p̂^T / p̂^S) up to a constant of the row
    if kl[1]:
        p_student = student.softmax(1)
    else:
        gap = log_ratio.mul_(p_teacher).sum(1)
        p_student = torch.softmax(student, 1, out=log_ratio)
    log_sum_student = -p_student.amax(1).log_()
    log_sums = log_sum_student, log_sum_teacher
    offset = log_sum_student - log_sum_teacher
    if not kl[1]:
        # A divergence is below 0 by rounding only; the gradient does not pass through this line.
        return _Block(p_student, p_teacher, None, (gap + offset).clamp_min_(0), maxima, log_sums)
    log_ratio.add_(offset[:, None]).neg_()
    kl_forward = -torch.mul(log_ratio, p_teacher, out=student).sum(1)
    kl_reverse = torch.mul(log_ratio, p_student, out=student).sum(1)
    within = kl[0] * kl_forward.clamp_min_(0) + kl[1] * kl_reverse.clamp_min(0)
    return _Block(p_student, p_teacher, log_ratio.sub_(kl_reverse[:, None]), within, maxima, log_sums)


def _clear(values: Tensor, void: Tensor | None) -> Tensor:
    """Set `values` to 0 in place where `void` says so: −inf − (−inf) is no number."""
    if void is None:
        return values
    return values.masked_fill_(void, 0.0) if void.dtype == torch.bool else values.scatter_(1, void, 0.0)


def _split(logits: list[Tensor], indices: Sequence[Tensor], valids: Sequence[Tensor | None], kl: tuple[float, float]) -> list[_Block]:
    """The blocks of the listed groups and, last, of the rest. `logits` (student's, teacher's) are overwritten."""
    blocks = []
    for index, valid in zip(indices, valids, strict=True):
        sides = [side.gather(1, index) for side in logits]
        void = None if valid is None else ~valid
        if void is not None:
            sides = [side.masked_fill_(void, -torch.inf) for side in sides]
        blocks.append(_compare(*sides, kl, void))
    void = torch.cat(list(indices), 1) if indices else None
    if void is not None:
        logits = [side.scatter_(1, void, -torch.inf) for side in logits]
    return [*blocks, _compare(*logits, kl, void)]


def _log_masses(blocks: list[_Block]) -> tuple[Tensor, Tensor]:
    """(N, G) log masses of student and teacher, relative to the row's maximum: a shifted row loses no digits."""
    maxima = torch.stack([side for block in blocks for side in block.maxima], 1)
    log_sums = torch.stack([side for block in blocks for side in block.log_sums], 1)
    maxima, log_sums = (stacked.unflatten(1, (-1, 2)) for stacked in (maxima, log_sums))  # (N, G, 2)
    log_mass = log_sums.add_(maxima - maxima.amax(1, keepdim=True))
    return log_mass.sub_(log_mass.logsumexp(1, keepdim=True)).unbind(2)


def _block_gradient(
    student: Tensor, teacher: Tensor, centred_log_ratio: Tensor | None, slope: Tensor, grad: Tensor | None, kl: tuple[float, float]
) -> Tensor:
    """(N, K) gradient of one block: `slope` (N,) is that of the block's log mass, `grad` (N,) comes down on its divergence."""
    if grad is None:
        return student * slope[:, None]
    forward, reverse = (grad * weight for weight in kl)
    gradient = student * (slope + forward)[:, None]
    gradient.addcmul_(teacher, forward[:, None], value=-1)
    if centred_log_ratio is not None:
        gradient.addcmul_(centred_log_ratio * student, reverse[:, None])
    return gradient


class _Decompose(torch.autograd.Function):
    """`decompose` in one pass, with the closed-form gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, student: Tensor, teacher: Tensor, temperature: float, kl: tuple[float, float], *groups: Tensor | None
    ) -> tuple[Tensor, ...]:
        dtype = work_dtype(student, teacher)
        scaled = [side / temperature if side.dtype == dtype else side.to(dtype).div_(temperature) for side in (student, teacher)]
        blocks = _split(scaled, groups[::2], groups[1::2], kl)
        log_mass_student, log_mass_teacher = _log_masses(blocks)
        mass_student, mass_teacher = log_mass_student.exp(), log_mass_teacher.exp()
        mass = (mass_teacher * (log_mass_teacher - log_mass_student)).sum(1).clamp_min_(0)
        softmaxes = (tensor for block in blocks for tensor in block[:3])
        ctx.save_for_backward(mass_student, mass_teacher, *groups, *softmaxes)
        ctx.temperature, ctx.kl, ctx.dtype, ctx.num_groups = temperature, kl, student.dtype, len(blocks)
        ctx.mark_non_differentiable(log_mass_teacher)
        ctx.set_materialize_grads(False)  # a stream that leaves a part out costs no pass over it
        return mass, log_mass_student, log_mass_teacher, *(block.within for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mass: Tensor | None, grad_log_mass: Tensor | None, _: None, *grad_within: Tensor | None) -> Any:
        mass_student, mass_teacher, *saved = ctx.saved_tensors
        groups, softmaxes = saved[: 2 * (ctx.num_groups - 1)], saved[2 * (ctx.num_groups - 1) :]
        slope = torch.zeros_like(mass_student)
        if grad_mass is not None:
            slope = (mass_student - mass_teacher) * grad_mass[:, None]
        if grad_log_mass is not None:
            slope = slope + grad_log_mass - mass_student * grad_log_mass.sum(1, keepdim=True)
        gradients = [
            _block_gradient(
                *softmaxes[3 * g : 3 * g + 3], slope[:, g] / ctx.temperature, None if grad is None else grad / ctx.temperature, ctx.kl
            )
            for g, grad in enumerate(grad_within)
        ]
        gradient = gradients.pop()
        for index, listed in zip(groups[::2], gradients, strict=True):
            gradient.scatter_add_(1, index, listed)  # 0 there so far; an invalid entry adds 0
        return gradient.to(ctx.dtype), None, None, None, *(None for _ in groups)
