"""Logit standardization (arXiv 2403.01427, CVPR 2024)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kd_core.partition_blocks import find_neg_inf, to_work_dtype, work_dtype

EPSILON = 1e-7  # as in the released code


def standardize_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Z-score both (N, C) logit tensors row by row: (z − mean) / (std + 1e-7), std being the sample's.

    A row that is constant on either side, to rounding, has no shape to compare. It is set to 0 on both sides, so it
    adds 0 to every loss, with a gradient of 0; the formula alone would multiply its gradient by up to 1e7. In float16,
    which that overflows, rows within 1/256 of their mean count as constant. A logit of −inf stays −inf, with a gradient
    of 0: mean and std are those of a side's other classes. These exceptions are ours.

    Returns:
        Student and teacher, at least float32, finite for |z| up to 1e30. The teacher's has no gradient.
    """
    dtype = work_dtype(student_logits, teacher_logits)
    student = _centre(student_logits.detach(), dtype)
    teacher = _centre(teacher_logits.detach(), dtype)
    constant = (student.std == 0) | (teacher.std == 0)
    z_teacher = teacher.logits.mul_((1 / (teacher.std + EPSILON)).masked_fill_(constant, 0.0))
    student = student._replace(std=student.std.masked_fill_(constant, torch.inf))
    z_student = _Standardize.apply(student_logits, *student)
    sides = (z_student, student.absent), (z_teacher, teacher.absent)
    return tuple(z if absent is None else z.masked_fill(absent & ~constant, -torch.inf) for z, absent in sides)


class _Centred(NamedTuple):
    """One side less its mean.

    logits: (N, C), in fresh memory; 0 where absent.
    std: (N, 1) standard deviation, 0 for constant rows.
    count: C, or the number (N, 1) of the classes that are not absent.
    absent: (N, C) where the logit was −inf, or None.
    """

    logits: Tensor
    std: Tensor
    count: int | Tensor
    absent: Tensor | None


def _centre(logits: Tensor, dtype: torch.dtype) -> _Centred:
    centred = to_work_dtype(logits, dtype, 1.0)
    mean = centred.mean(1, keepdim=True)
    count, absent = logits.shape[1], None
    if find_neg_inf(mean) is not None:  # −inf has a mean of −inf
        absent = centred == -torch.inf
        count = (~absent).sum(1, keepdim=True)
        mean = centred.masked_fill_(absent, 0.0).sum(1, keepdim=True).div_(count)
    size = _largest(centred)
    centred.sub_(mean)
    if absent is not None:
        centred.masked_fill_(absent, 0.0)
    spread = _largest(centred)
    # The mean is off by a few units in the last place.
    least = EPSILON + 8 * torch.finfo(dtype).eps * size
    squares = (centred / spread).square_().sum(1, keepdim=True)  # those of 1e30 itself overflow float32
    std = spread * (squares / (count - 1)).sqrt_()
    # The gradient, of the size of 1 / std, has to fit float16; one outlier's std is far below its spread.
    constant = (spread <= least) | (std <= max(EPSILON, 256 / torch.finfo(logits.dtype).max))
    return _Centred(centred, std.masked_fill_(constant, 0.0), count, absent)


def _largest(logits: Tensor) -> Tensor:
    """(N, 1) largest absolute value of a row."""
    return torch.maximum(logits.amax(1, keepdim=True), -logits.amin(1, keepdim=True))


class _Standardize(torch.autograd.Function):
    """z = (x − mean) / (std + ε) in the memory of x − mean; 0, with a gradient of 0, where std is infinite.

        ∂/∂x = (g − mean g) / (std + ε) − z · Σ(g·z) / (std · (C − 1))       g: the gradient that comes down on z

    C and the mean are of the classes that are not absent; an absent one has z = 0, and a gradient of 0.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, centred: Tensor, std: Tensor, count: int | Tensor, absent: Tensor | None
    ) -> Tensor:
        inverse = 1 / (std + EPSILON)
        z = centred.mul_(inverse)
        norm = torch.where(std.isinf(), std, std * (count - 1))  # a row of one class would have inf · 0
        ctx.save_for_backward(z, inverse, norm, absent)
        ctx.count, ctx.dtype = count, logits.dtype
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, inverse, norm, absent = ctx.saved_tensors
        along = (grad * z).sum(1, keepdim=True) / norm
        gradient = (grad - grad.sum(1, keepdim=True) / ctx.count).mul_(inverse).addcmul_(z, along, value=-1)
        if absent is not None:
            gradient.masked_fill_(absent, 0.0)
        return gradient.to(ctx.dtype), None, None, None, None
