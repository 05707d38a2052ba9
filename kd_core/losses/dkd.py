"""Decoupled knowledge distillation."""

from typing import Any

from torch import Tensor

from kd_core.losses.checks import as_number
from kd_core.losses.target_partition import TargetPartitionLoss


class DKDLoss(TargetPartitionLoss):
    """DKD, arXiv 2203.08679, section 3.2:

        DKD  = tckd + nckd
        tckd = α · T² · mean KL(b^T || b^S)                   b = [p_t, 1 − p_t]
        nckd = β · T² · mean KL(p̂^T || p̂^S)                   p̂_i = p_i / (1 − p_t), i ≠ t

    Args:
        alpha: α.
        beta: β.
        temperature: T.
        partition: which class t is: "target", the label, or "teacher_top1", the teacher's largest logit; the latter
            (GDKD's released code) does not read the label: `target` may be None, as without labels or under mixup.
        options: `weight`, `warmup`, `standardize`, `topk`, … of `DistillationLoss`.

    Raises:
        ValueError: another `partition`, or what `DistillationLoss` refuses.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        partition: str = "target",
        **options: Any,
    ) -> None:
        super().__init__(temperature, partition=partition, **options)
        self.alpha, self.beta = as_number(alpha, "alpha"), as_number(beta, "beta")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"tckd": self.alpha, "nckd": self.beta}

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        parts = self.decompose(student_logits, teacher_logits, target, k)
        return {"tckd": parts.mass, "nckd": parts.within[1]}
