"""Logit standardization (arXiv 2403.01427, CVPR 2024)."""

import torch
from torch import Tensor

from kd_core.partition import work_dtype

EPSILON = 1e-7  # as in the released code


def standardize_logits(student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Z-score both (N, C) logit tensors row by row: (z − mean) / (std + 1e-7), with the sample's standard deviation.

    A row that is constant on either side, to the rounding of its dtype, has no shape to compare: it is set to 0 on both, so it adds 0
    to every loss with a gradient of 0, where the formula alone would send up to 1e7 times the gradient back (the last part is ours).

    Returns:
        Student and teacher, at least float32, finite for |z| up to 1e30.
    """
    dtype = work_dtype(student_logits, teacher_logits)
    (student, flat_student), (teacher, flat_teacher) = (_z_score(side.to(dtype)) for side in (student_logits, teacher_logits))
    flat = flat_student | flat_teacher
    return student.masked_fill(flat, 0.0), teacher.masked_fill(flat, 0.0)


def _z_score(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Standardized logits (N, C), and which rows (N, 1) are constant. The variance of 1e30 overflows, so the row is scaled first."""
    centred = logits - logits.mean(1, keepdim=True)
    scale = centred.detach().abs().amax(1, keepdim=True)
    largest = logits.detach().abs().amax(1, keepdim=True)
    flat = scale <= EPSILON + 8 * torch.finfo(logits.dtype).eps * largest
    scale = scale.masked_fill(flat, 1.0)
    relative = (centred / scale).masked_fill(flat, 1.0)
    std = relative.std(1, keepdim=True).masked_fill(flat, 1.0)
    return relative / (std + EPSILON / scale), flat
