"""Classical knowledge distillation, its two parts kept apart."""

from typing import Any

from torch import Tensor

from kd_core.losses.target_partition import TargetPartitionLoss


class KDLoss(TargetPartitionLoss):
    """Hinton et al., arXiv 1503.02531, decoupled exactly, row by row, as in DKD, arXiv 2203.08679, section 3.1:

        KD   = T² · mean KL(p^T || p^S) = tckd + nckd
        tckd = T² · mean KL(b^T || b^S)                       b = [p_t, 1 − p_t]
        nckd = T² · mean (1 − p_t^T) · KL(p̂^T || p̂^S)         p̂_i = p_i / (1 − p_t), i ≠ t

    With `topk` the mask acts on p̂ in `nckd` (DeepKD, arXiv 2505.15133); with all classes admitted the sum is KD again.

    The sum does not depend on which class t is. Where a row has no single label (unlabelled images, mixup, soft
    targets), take `partition="teacher_top1"` and `target=None`: the sum is still KD, and `tckd` is what the teacher's
    top class contributes.

    Args:
        temperature: T.
        weight: factor of both terms.
        partition: which class t is: "target", the label, or "teacher_top1", the teacher's largest logit.
        options: `warmup`, `standardize`, `topk`, … of `DistillationLoss`.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}

    def __init__(
        self, temperature: float = 4.0, weight: float = 1.0, partition: str = "target", **options: Any
    ) -> None:
        super().__init__(temperature, weight, partition, **options)

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        parts = self.decompose(student_logits, teacher_logits, target, k)
        return {"tckd": parts.mass, "nckd": parts.log_mass_teacher[1].exp() * parts.within[1]}
