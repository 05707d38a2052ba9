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

# Weights of the forward KL(T||S) and the reverse KL(S||T) within a group. That of the masses is always forward.
KL_TYPES = {"forward": (1.0, 0.0), "reverse": (0.0, 1.0), "both": (0.5, 0.5)}


class Group(NamedTuple):
    """Classes of one group, row by row.

    index: (N, K) class indices, no class twice in a row.
    valid: (N, K) bool, for rows of different sizes: entries that are False do not count; they repeat a class that does.
    """

    index: Tensor
    valid: Tensor | None = None


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


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype losses are computed in: float64 where one side is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class _Block(NamedTuple):
    """One group on both sides. Softmaxes (N, K); row statistics (N,), student first."""

    student: Tensor  # p̂^S
    teacher: Tensor  # p̂^T
    centred_log_ratio: Tensor | None  # log(p̂^S / p̂^T) − KL(p̂^S || p̂^T), kept for the reverse gradient only
    within: Tensor
    maxima: tuple[Tensor, Tensor]  # largest logit of the group
    log_sums: tuple[Tensor, Tensor]  # log Σ exp(logit − maximum)


def _single_class(student: Tensor, teacher: Tensor) -> _Block:
    """The block of a one-class group: its distribution is (1) on both sides."""
    ones, zeros = torch.ones_like(student), torch.zeros_like(student[:, 0])
    return _Block(ones, ones, None, zeros, (student[:, 0], teacher[:, 0]), (zeros, zeros))


def _compare(student: Tensor, teacher: Tensor, kl: tuple[float, float], void: Tensor | None = None) -> _Block:
    """Compare two (N, K) blocks of logits, which are overwritten: forward KL keeps three buffers of that size alive.

    void: where both sides are −inf, a class of another group: column indices (N, V), or a mask (N, K).
    """
    if student.shape[1] == 1:
        return _single_class(student, teacher)
    maxima = student.amax(1), teacher.amax(1)
    student.sub_(maxima[0][:, None])
    teacher.sub_(maxima[1][:, None])
    p_teacher = teacher.softmax(1)
    log_ratio = _clear(teacher.sub_(student), void)  # log(p̂^T / p̂^S) up to a constant of the row
    if kl[1]:
        p_student = student.softmax(1)
    else:
        gap = log_ratio.mul_(p_teacher).sum(1)
        p_student = torch.softmax(student, 1, out=log_ratio)
    # The largest logit is 0 now, so max p̂ = 1 / Σ exp, and that is never 0.
    log_sums = -p_student.amax(1).log_(), -p_teacher.amax(1).log_()
    offset = log_sums[0] - log_sums[1]
    if not kl[1]:
        # A divergence is below 0 by rounding only; the gradient does not pass through this line.
        return _Block(p_student, p_teacher, None, gap.add_(offset).clamp_min_(0), maxima, log_sums)
    log_ratio.add_(offset[:, None]).neg_()
    kl_forward = -torch.mul(log_ratio, p_teacher, out=student).sum(1)
    kl_reverse = torch.mul(log_ratio, p_student, out=student).sum(1)
    within = kl[0] * kl_forward.clamp_min_(0) + kl[1] * kl_reverse.clamp_min(0)
    return _Block(p_student, p_teacher, log_ratio.sub_(kl_reverse[:, None]), within, maxima, log_sums)


def _clear(values: Tensor, void: Tensor | None) -> Tensor:
    """Set `values` to 0 in place where `void` says so: −inf − (−inf) is no number."""
    if void is None:
        return values
    return values.masked_fill_(void, 0.0) if void.dtype == torch.bool else _put(values, void, 0.0)


def _put(values: Tensor, index: Tensor, value: float) -> Tensor:
    """`values.scatter_(1, index, value)`, which on a CPU is four times slower with a number than with a tensor."""
    return values.scatter_(1, index, values.new_full(index.shape, value))


def _split(
    logits: Sequence[Tensor], indices: Sequence[Tensor], valids: Sequence[Tensor | None], kl: tuple[float, float]
) -> list[_Block]:
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
        logits = [_put(side, void, -torch.inf) for side in logits]
    return [*blocks, _compare(*logits, kl, void)]


def _log_masses(blocks: list[_Block], side: int) -> Tensor:
    """(G, N) log masses of the student (side 0) or the teacher (1).

    Relative to the row's maximum, so that a row far from 0 loses no digits.
    """
    maxima = torch.stack([block.maxima[side] for block in blocks])
    log_sums = torch.stack([block.log_sums[side] for block in blocks])
    return log_sums.add_(maxima - maxima.amax(0)).log_softmax(0)


def _block_gradient(
    softmaxes: Sequence[Tensor | None], slope: Tensor, grad: Tensor | None, kl: tuple[float, float]
) -> Tensor:
    """(N, K) gradient of one block.

    softmaxes: the first three fields of the `_Block`.
    slope: (N,) gradient that comes down on the log mass of the block.
    grad: (N,) gradient that comes down on its divergence, or None.
    """
    student, teacher, centred_log_ratio = softmaxes
    if grad is None:
        return student * slope[:, None]
    forward, reverse = (grad * weight for weight in kl)
    gradient = (student - teacher).mul_(forward[:, None])  # the difference first: equal sides give exactly 0
    gradient.addcmul_(student, slope[:, None])
    if centred_log_ratio is not None:
        gradient.addcmul_(centred_log_ratio * student, reverse[:, None])
    return gradient


class _Decompose(torch.autograd.Function):
    """`decompose` in one pass, with the closed-form gradients of the module's docstring."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        temperature: float,
        kl: tuple[float, float],
        *groups: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = work_dtype(student, teacher)
        scaled = [_scaled(side, dtype, temperature) for side in (student, teacher)]
        blocks = _split(scaled, groups[::2], groups[1::2], kl)
        log_mass_student, log_mass_teacher = _log_masses(blocks, 0), _log_masses(blocks, 1)
        mass_student, mass_teacher = log_mass_student.exp(), log_mass_teacher.exp()
        mass = (mass_teacher * (log_mass_teacher - log_mass_student)).sum(0).clamp_min_(0)
        softmaxes = (tensor for block in blocks for tensor in block[:3])
        ctx.save_for_backward(mass_student, mass_teacher, *groups, *softmaxes)
        ctx.temperature, ctx.kl, ctx.dtype, ctx.num_listed = temperature, kl, student.dtype, len(blocks) - 1
        ctx.mark_non_differentiable(log_mass_teacher)
        ctx.set_materialize_grads(False)  # a stream that leaves a part out costs no pass over it
        return mass, log_mass_student, log_mass_teacher, *(block.within for block in blocks)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_mass: Tensor | None, grad_log_mass: Tensor | None, _: None, *grad_within: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        mass_student, mass_teacher, *saved = ctx.saved_tensors
        groups, softmaxes = saved[: 2 * ctx.num_listed], saved[2 * ctx.num_listed :]
        scale = 1 / ctx.temperature  # du/dz
        slope = torch.zeros_like(mass_student)
        if grad_mass is not None:
            slope = (mass_student - mass_teacher) * (grad_mass * scale)
        if grad_log_mass is not None:
            slope = slope + (grad_log_mass - mass_student * grad_log_mass.sum(0)) * scale
        *listed, gradient = (
            _block_gradient(softmaxes[3 * g : 3 * g + 3], slope[g], None if grad is None else grad * scale, ctx.kl)
            for g, grad in enumerate(grad_within)
        )
        for index, block in zip(groups[::2], listed, strict=True):
            gradient.scatter_add_(1, index, block)  # 0 there so far; an entry that does not count adds 0
        return gradient.to(ctx.dtype), None, None, None, *(None for _ in groups)


def _scaled(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """A fresh copy of z / T in `dtype`: half precision is widened before it is divided."""
    return logits / temperature if logits.dtype == dtype else logits.to(dtype).div_(temperature)
