"""The dynamic top-k mask (DTM) of DeepKD (arXiv 2505.15133)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_core.partition import decompose
from kd_core.partition_blocks import find_neg_inf, largest_indices, scatter_value_
from kd_core.schedules import linear

MIN_CLASSES = 2  # over one class there is one distribution, and NCKD is 0


class TopKSchedule:
    """How many of the non-target classes the mask admits: easy → transition → hard.

        easy        the share rises linearly from `start` to `plateau`
        transition  it stays at `plateau`
        hard        it rises linearly from `plateau` to 1, and stays there

        K = max(2, ceil(share · (C − 1))), and at most C − 1

    A pure function of progress. Three phases, from 5 % of the classes to all of them, are the paper's; their lengths
    and the plateau are not published: equal thirds and 50 % are ours.

    Args:
        start: share of the C − 1 non-target classes at progress 0, in [0, 1].
        plateau: share in the transition phase, in [start, 1].
        phases: lengths of the three phases as shares of training progress; they add up to 1 or less.

    Raises:
        ValueError: shares or lengths outside these bounds.
    """

    def __init__(
        self, start: float = 0.05, plateau: float = 0.5, phases: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)
    ) -> None:
        if not 0 <= start <= plateau <= 1:
            raise ValueError(f"a top-k schedule needs 0 <= start <= plateau <= 1, not start {start}, plateau {plateau}")
        try:
            easy, transition, hard = map(float, phases)
        except (TypeError, ValueError):
            easy = transition = hard = math.nan
        if not (min(easy, transition, hard) >= 0 and easy + transition + hard <= 1 + 1e-6):
            raise ValueError(f"phases must be three lengths >= 0 that add up to 1 or less, not {phases}")
        self.start, self.plateau, self.phases = float(start), float(plateau), (easy, transition, hard)

    def share(self, progress: float | None) -> float:
        """The admitted share of the non-target classes; None is the end of training."""
        if progress is None:
            return 1.0
        easy, transition, hard = self.phases
        if progress < easy + transition:
            return linear(progress, 0.0, easy, self.start, self.plateau)
        return linear(progress, easy + transition, easy + transition + hard, self.plateau, 1.0)

    def k(self, progress: float | None, num_classes: int) -> int:
        """K, out of the `num_classes` − 1 non-target classes."""
        classes = num_classes - 1
        wanted = math.ceil(self.share(progress) * classes - 1e-9)  # .07 · 100 is 7.000000000000001
        return min(max(MIN_CLASSES, wanted), classes)

    def __repr__(self) -> str:
        return f"TopKSchedule(start={self.start}, plateau={self.plateau}, phases={self.phases})"


def top_nontarget_classes(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """(N, K) indices of the K largest teacher logits among the non-target classes: the target is never one of them."""
    lowest = torch.finfo(teacher_logits.dtype).min  # above −inf: a class that the teacher excludes is before the target
    others = teacher_logits.detach().clamp(min=lowest)
    return largest_indices(scatter_value_(others, target[:, None], -torch.inf), k)


def masked_nckd(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int, temperature: float) -> Tensor:
    """(N,) KL(p̂^T || p̂^S), both distributions renormalised over the same K non-target classes; without T².

    A class of teacher logit −inf is never kept: where fewer than K others are left, those are all.
    """
    kept = top_nontarget_classes(teacher_logits, target, k)
    student, teacher = student_logits.gather(1, kept), teacher_logits.gather(1, kept)
    if find_neg_inf(teacher.amin(1)) is not None:
        student = student.masked_fill(teacher == -torch.inf, -torch.inf)
    return decompose(student, teacher, temperature=temperature).within[0]
