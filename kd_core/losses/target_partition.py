"""The partition target | rest, with the top-k mask on the rest: what KD, DKD and AEKT have in common."""

from typing import Any

import torch
from torch import Tensor

from kd_core.losses.base import DistillationLoss, warn_no_nontarget_term
from kd_core.partition import Decomposition, Group, decompose
from kd_core.topk import masked_nckd

PARTITIONS = ("target", "teacher_top1")


class TargetPartitionLoss(DistillationLoss):
    """A loss over TCKD = KL(b^T || b^S) and NCKD = KL(p̂^T || p̂^S) of each row (DKD, arXiv 2203.08679).

    Args:
        temperature: T.
        weight: factor of every term.
        partition: which class t is: "target", the label, or "teacher_top1", the teacher's largest logit. The latter
            reads no label, so `target` may be None.
        options: `warmup`, `standardize`, `topk`, … of `DistillationLoss`.

    Raises:
        ValueError: another `partition`, or what `DistillationLoss` refuses.
    """

    takes_topk = True

    def __init__(
        self, temperature: float = 4.0, weight: float = 1.0, partition: str = "target", **options: Any
    ) -> None:
        super().__init__(temperature, weight, **options)
        if partition not in PARTITIONS:
            raise ValueError(f"partition must be one of {', '.join(PARTITIONS)}, not {partition!r}")
        self.partition = partition
        self.needs_target = partition == "target"

    def decompose(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int) -> Decomposition:
        """TCKD as `mass` and NCKD as `within[1]`, (N,) each, without T²; log masses of the target (0) and the rest (1).

        Where K is below C − 1 NCKD compares the K kept classes alone; TCKD and the masses still see all of them.
        """
        num_classes = student_logits.shape[1]
        if self.partition == "teacher_top1":
            target = teacher_logits.argmax(1)
        if num_classes == 2 and not torch.compiler.is_compiling():
            warn_no_nontarget_term(type(self).__name__)
        parts = decompose(student_logits, teacher_logits, [Group(target[:, None])], self.temperature)
        if k == num_classes - 1:
            return parts
        nckd = masked_nckd(student_logits, teacher_logits, target, k, self.temperature)
        return parts._replace(within=(parts.within[0], nckd))
