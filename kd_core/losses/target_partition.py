"""The partition {target} | rest, with the top-k mask on the rest: what KD, DKD and AEKT share."""

from torch import Tensor

from kd_core.losses.base import DistillationLoss, note_void
from kd_core.partition import Decomposition, Group, decompose
from kd_core.topk import masked_divergence


def target_partition(
    loss: DistillationLoss, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: float | None
) -> Decomposition:
    """TCKD as `mass` and NCKD as `within[1]` (N,), without T²; log masses are those of the target (0) and of the rest (1).

    With `loss.topk`, NCKD compares the kept classes alone, while TCKD and the masses still see all of them.
    """
    num_classes = student_logits.shape[1]
    if num_classes == 2:
        note_void(type(loss).__name__)
    parts = decompose(student_logits, teacher_logits, [Group(target[:, None])], loss.temperature)
    k = num_classes - 1 if loss.topk is None else loss.topk.k(progress, num_classes)
    if k >= num_classes - 1:
        return parts
    nckd = masked_divergence(student_logits, teacher_logits, target, k, loss.temperature)
    return parts._replace(within=(parts.within[0], nckd))
