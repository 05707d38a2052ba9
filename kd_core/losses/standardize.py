"""Logit standardization (arXiv 2403.01427, CVPR 2024)."""

import torch
from torch import Tensor

from kd_core.partition import work_dtype

EPSILON = 1e-7  # as in the released code


def standardize_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Z-score both (N, C) logit tensors row by row: (z − mean) / (std + 1e-7), std being the sample's.

    A row that is constant on either side, to the rounding of its dtype, has no shape to compare. It is set to 0 on both
    sides, so that it adds 0 to every loss, with a gradient of 0; the formula alone would multiply its gradient by up to
    1e7. This exception is ours.

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
    logits = logits.to(dtype)
    centred = logits - logits.mean(1, keepdim=True)
    scale = centred.detach().abs().amax(1, keepdim=True)
    largest = logits.detach().abs().amax(1, keepdim=True)
    # The mean is off by a few units in the last place.
    constant = scale <= EPSILON + 8 * torch.finfo(dtype).eps * largest
    scale = scale.masked_fill(constant, 1.0)
    relative = centred / scale  # the squares of 1e30 overflow float32
    std = relative.masked_fill(constant, 1.0).std(1, keepdim=True).masked_fill(constant, 1.0)
    return relative / (std + EPSILON / scale), constant
