"""Decoupled knowledge distillation."""

from typing import Any

from torch import Tensor

from kd_core.losses.base import DistillationLoss
from kd_core.losses.target_partition import target_partition

PARTITIONS = ("target", "teacher_top1")


class DKDLoss(DistillationLoss):
    """DKD, arXiv 2203.08679, section 3.2:

        DKD = α · TCKD + β · NCKD
        tckd = α · T² · mean KL(b^T || b^S)                          b = [p_t, 1 − p_t]
        nckd = β · T² · mean KL(p̂^T || p̂^S)                          p̂_i = p_i / (1 − p_t), i ≠ t

    Args:
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T.
        partition: "target", or "teacher_top1": t is the teacher's largest logit, and the label is not used (arXiv 2512.04625).
        options: `weight`, `warmup`, `standardize`, `topk` of `DistillationLoss`.

    Raises:
        ValueError: another `partition`; and those of `DistillationLoss`.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}
    takes_topk = True

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, partition: str = "target", **options: Any
    ) -> None:
        super().__init__(temperature, **options)
        if partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
        self.alpha, self.beta, self.partition = float(alpha), float(beta), partition
        self.needs_target = partition == "target"

    @property
    def coefficients(self) -> dict[str, float]:
        return {"tckd": self.alpha, "nckd": self.beta}

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, progress: float | None
    ) -> dict[str, Tensor]:
        if self.partition == "teacher_top1":
            target = teacher_logits.argmax(1)
        parts = target_partition(self, student_logits, teacher_logits, target, progress)
        return {"tckd": parts.mass, "nckd": parts.within[1]}
