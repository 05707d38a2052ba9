"""Logit standardization (arXiv 2403.01427, CVPR 2024)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kd_core.partition_blocks import scaled, work_dtype

EPSILON = 1e-7  # as in the released code


def standardize_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Z-score both (N, C) logit tensors row by row: (z − mean) / (std + 1e-7), std being the sample's.

    A row that is constant on either side, to rounding, has no shape to compare. It is set to 0 on both sides, so it
    adds 0 to every loss, with a gradient of 0; the formula alone would multiply its gradient by up to 1e7. In float16,
    which that overflows, rows within 1/256 of their mean count as constant. These exceptions are ours.

    Returns:
        Student and teacher, at least float32, finite for |z| up to 1e30. The teacher's has no gradient.
    """
    dtype = work_dtype(student_logits, teacher_logits)
    student, student_std = _centre(student_logits.detach(), dtype)
    teacher, teacher_std = _centre(teacher_logits.detach(), dtype)
    constant = (student_std == 0) | (teacher_std == 0)
    z_teacher = teacher.mul_((1 / (teacher_std + EPSILON)).masked_fill_(constant, 0.0))
    return _Standardize.apply(student_logits, student, student_std.masked_fill_(constant, torch.inf)), z_teacher


def _centre(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits less their mean (N, C), in fresh memory, and their standard deviation (N, 1), 0 for constant rows."""
    centred = scaled(logits, dtype, 1.0)
    mean = centred.mean(1, keepdim=True)
    size = _largest(centred)
    spread = _largest(centred.sub_(mean))
    # The mean is off by a few units in the last place; and the gradient, of the size of 1 / std, has to fit float16.
    least = max(EPSILON, 256 / torch.finfo(logits.dtype).max) + 8 * torch.finfo(dtype).eps * size
    squares = (centred / spread).square_().sum(1, keepdim=True)  # those of 1e30 itself overflow float32
    std = spread * (squares / (logits.shape[1] - 1)).sqrt_()
    return centred, std.masked_fill_(spread <= least, 0.0)


def _largest(logits: Tensor) -> Tensor:
    """(N, 1) largest absolute value of a row."""
    return torch.maximum(logits.amax(1, keepdim=True), -logits.amin(1, keepdim=True))


class _Standardize(torch.autograd.Function):
    """z = (x − mean) / (std + ε) in the memory of x − mean; 0, with a gradient of 0, where std is infinite.

        ∂/∂x = (g − mean g) / (std + ε) − z · Σ(g·z) / (std · (C − 1))       g: the gradient that comes down on z
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, centred: Tensor, std: Tensor) -> Tensor:
        inverse = 1 / (std + EPSILON)
        z = centred.mul_(inverse)
        ctx.save_for_backward(z, inverse, std)
        ctx.dtype = logits.dtype
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        z, inverse, std = ctx.saved_tensors
        along = (grad * z).sum(1, keepdim=True) / (std * (z.shape[1] - 1))
        gradient = (grad - grad.mean(1, keepdim=True)).mul_(inverse).addcmul_(z, along, value=-1)
        return gradient.to(ctx.dtype), None, None
