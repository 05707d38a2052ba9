"""The partition target | rest, with the top-k mask on the rest: what KD, DKD and AEKT have in common."""

from torch import Tensor

from kd_core.losses.base import DistillationLoss, note_void
from kd_core.partition import Decomposition, Group, decompose
from kd_core.topk import masked_nckd


class TargetPartitionLoss(DistillationLoss):
    """A loss over TCKD = KL(b^T || b^S) and NCKD = KL(p̂^T || p̂^S) of each row (DKD, arXiv 2203.08679)."""

    takes_topk = True

    def decompose(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int) -> Decomposition:
        """TCKD as `mass` and NCKD as `within[1]`, (N,) each, without T²; log masses of the target (0) and the rest (1).

        Where K is below C − 1 NCKD compares the K kept classes alone; TCKD and the masses still see all of them.
        """
        num_classes = student_logits.shape[1]
        if num_classes == 2:
            note_void(type(self).__name__)
        parts = decompose(student_logits, teacher_logits, [Group(target[:, None])], self.temperature)
        if k == num_classes - 1:
            return parts
        nckd = masked_nckd(student_logits, teacher_logits, target, k, self.temperature)
        return parts._replace(within=(parts.within[0], nckd))
