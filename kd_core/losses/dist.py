"""DIST: correlations in place of divergences."""

from typing import Any

import torch
from torch import Tensor

from kd_core.losses.base import DistillationLoss
from kd_core.losses.checks import as_number, refuse_row_options
from kd_core.losses.standardize import standardize_logits
from kd_core.partition_blocks import work_dtype

EPSILON = 1e-8  # released code: added to the product of the two norms


class DISTLoss(DistillationLoss):
    """DIST (NeurIPS 2022), with ρ Pearson's correlation and p = softmax(z / T):

        DIST  = inter + intra
        inter = β · T² · mean_rows    (1 − ρ(p^S, p^T))       over the C classes of a row
        intra = γ · T² · mean_classes (1 − ρ(p^S, p^T))       over the N rows of a class

    A row or class that is constant on either side, to rounding, has ρ = 0 with a gradient of 0. The released formula
    has the same value there, and a gradient of up to 1e8. That overflows float16, where a row or class that
    varies by less than 1/256 of its size counts as constant. Both are ours.

    Both terms are in stream "ncg": they compare whole distributions, as the non-target terms do. The choice is ours.

    Args:
        beta: β.
        gamma: γ.
        temperature: T; the released classification code has 4 on CIFAR-100 and 1 on ImageNet.
        options: `weight`, `warmup`, `standardize` of `DistillationLoss`. `row_weights` weight the rows of `inter`, and
            means and sums of `intra`, so a row of weight 0 takes no part in it.

    Raises:
        ValueError: `reduction` "none" or `chunk_rows`, as `intra` has no terms of single rows, or what
            `DistillationLoss` refuses.
    """

    terms = {"inter": "ncg", "intra": "ncg"}
    needs_target = False

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(temperature, **options)
        refuse_row_options(self)
        self.beta, self.gamma = as_number(beta, "beta"), as_number(gamma, "gamma")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"inter": self.beta, "intra": self.gamma}

    def weighted_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        k: int,
        warmup_weight: float | Tensor,
        row_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        least = 256 / torch.finfo(student_logits.dtype).max
        if self.standardize:
            student_logits, teacher_logits = standardize_logits(student_logits, teacher_logits)
        dtype = work_dtype(student_logits, teacher_logits)
        least = max(least, 32 * torch.finfo(dtype).eps)
        student, teacher = ((z.to(dtype) / self.temperature).softmax(1) for z in (student_logits, teacher_logits))
        num_rows, num_classes = student.shape
        inter = 1 - correlation(student, teacher, 1, least)
        weights, counts = None, min(num_rows, 1)
        if row_weights is not None:
            weights = row_weights.to(dtype)
            inter = inter * weights
            weights, counts = weights[:, None], counts * (weights.sum() > 0).to(dtype)
        intra = 1 - correlation(student, teacher, 0, least, weights)
        scale = self.weight * warmup_weight * self.temperature**2
        return {
            "inter": (inter * (scale * self.beta / max(num_rows, 1))).sum(),
            "intra": (intra * (scale * self.gamma * counts / num_classes)).sum(),
        }


def correlation(
    student: Tensor, teacher: Tensor, dim: int, least: float, weights: Tensor | None = None, epsilon: float = EPSILON
) -> Tensor:
    """Pearson's correlation along `dim` of two (N, C) tensors, `weights` (N, 1) being those of the rows.

    It is 0, with a gradient of 0, where the deviation from the mean is no larger than `least` times the values.
    """
    centred, norms, constant = [], [], []
    for values in (student, teacher):
        if weights is None:
            deviation = values - values.sum(dim, keepdim=True) / max(values.shape[dim], 1)
        else:
            total = weights.sum().clamp_min(torch.finfo(values.dtype).tiny)
            deviation = (values - (weights * values).sum(dim, keepdim=True) / total) * weights.sqrt()
            values = values * weights.sqrt()
        centred.append(deviation)
        norms.append(deviation.norm(dim=dim))
        constant.append(norms[-1] <= least * values.detach().norm(dim=dim))
    covariance = (centred[0] * centred[1]).sum(dim)
    return (covariance / (norms[0] * norms[1] + epsilon)).masked_fill(constant[0] | constant[1], 0.0)
