"""Logit standardization (arXiv 2403.01427, CVPR 2024)."""

import torch
from torch import Tensor

from kd_core.partition import work_dtype

EPSILON = 1e-7  # as in the released code


def standardize_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Z-score both (N, C) logit tensors row by row: (z − mean) / (std + 1e-7), std being the sample's.

    A row that is constant on either side, to rounding, has no shape to compare. It is set to 0 on both sides, so it
    adds 0 to every loss, with a gradient of 0; the formula alone would multiply its gradient by up to 1e7. In float16,
    which that overflows, rows within 1/256 of their mean count as constant. These exceptions are ours.

    Returns:
        Student and teacher, at least float32, finite for |z| up to 1e30.
    """
    dtype = work_dtype(student_logits, teacher_logits)
    student, student_constant = _z_score(student_logits, dtype)
    teacher, teacher_constant = _z_score(teacher_logits, dtype)
    constant = student_constant | teacher_constant
    return student.masked_fill(constant, 0.0), teacher.masked_fill(constant, 0.0)


def _z_score(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Standardized logits (N, C), and which rows (N, 1) are constant."""
    given, logits = torch.finfo(logits.dtype), logits.to(dtype)
    centred = logits - logits.mean(1, keepdim=True)
    scale = centred.detach().abs().amax(1, keepdim=True)
    largest = logits.detach().abs().amax(1, keepdim=True)
    # The mean is off by a few units in the last place; and the gradient, of the size of 1 / std, has to fit float16.
    constant = scale <= max(EPSILON, 256 / given.max) + 8 * torch.finfo(dtype).eps * largest
    scale = scale.masked_fill(constant, 1.0)
    relative = (centred / scale).masked_fill(constant, 1.0)  # the squares of 1e30 overflow float32
    std = (relative.square().sum(1, keepdim=True) / (logits.shape[1] - 1)).sqrt()
    return relative / (std + EPSILON / scale), constant
