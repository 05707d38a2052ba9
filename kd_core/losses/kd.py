"""Classical knowledge distillation, its two parts kept apart."""

from torch import Tensor

from kd_core.losses.base import DistillationLoss
from kd_core.losses.target_partition import target_partition
from kd_core.topk import TopKSchedule


class KDLoss(DistillationLoss):
    """Hinton et al., arXiv 1503.02531, decoupled exactly, row by row (DKD, arXiv 2203.08679, section 3.1):

        KD = T² · mean KL(p^T || p^S)  =  tckd + nckd
        tckd = T² · mean KL(b^T || b^S)                              b = [p_t, 1 − p_t]
        nckd = T² · mean (1 − p_t^T) · KL(p̂^T || p̂^S)                p̂_i = p_i / (1 − p_t), i ≠ t

    With `topk` the mask acts on p̂ in `nckd` (DeepKD, arXiv 2505.15133), and the sum is KD again once all classes are admitted.
    """

    terms = {"tckd": "tcg", "nckd": "ncg"}
    takes_topk = True

    def __init__(self, temperature: float = 4.0, weight: float = 1.0, warmup: float = 0.0, standardize: bool = False,
                 topk: TopKSchedule | None = None) -> None:
        super().__init__(temperature, weight, warmup, standardize, topk)

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: float | None
    ) -> dict[str, Tensor]:
        parts = target_partition(self, student_logits, teacher_logits, target, progress)
        return {"tckd": parts.mass, "nckd": parts.log_mass_teacher[:, 1].exp() * parts.within[1]}
