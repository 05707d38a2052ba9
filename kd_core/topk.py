"""The dynamic top-k mask (DTM) of DeepKD (arXiv 2505.15133)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_core.partition import decompose
from kd_core.schedules import linear


class TopKSchedule:
    """How many non-target classes the mask admits: easy → transition → hard.

        easy        share rises linearly from `start` to `plateau`
        transition  share stays at `plateau`
        hard        share rises linearly from `plateau` to 1; afterwards all classes are in

        K = max(2, ceil(share · (C − 1))),  at most C − 1

    A pure function of progress. K ≥ 2, since over one class NCKD is 0. The paper gives the 5 % of the start and the three phases; their
    lengths and the plateau are not published: equal thirds and 50 % are ours.

    Args:
        start: share of the C − 1 non-target classes at progress 0, in [0, 1].
        plateau: share in the transition phase, in [start, 1].
        phases: lengths of the three phases as shares of training progress; they add up to 1 or less.

    Raises:
        ValueError: shares or lengths outside these bounds.
    """

    def __init__(self, start: float = 0.05, plateau: float = 0.5, phases: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> None:
        if not 0 <= start <= plateau <= 1:
            raise ValueError(f"the top-k schedule needs 0 <= start <= plateau <= 1, not start {start}, plateau {plateau}")
        if len(phases) != 3 or min(phases) < 0 or sum(phases) > 1 + 1e-6:
            raise ValueError(f"phases are three lengths >= 0 that add up to 1 or less, not {list(phases)}")
        self.start, self.plateau, self.phases = float(start), float(plateau), tuple(float(length) for length in phases)

    def share(self, progress: float | None) -> float:
        """The share of the non-target classes that is admitted; None is the end of training."""
        easy, transition, hard = self.phases
        if progress is None:
            return 1.0
        if progress < easy + transition:
            return linear(progress, 0.0, easy, self.start, self.plateau)
        return linear(progress, easy + transition, easy + transition + hard, self.plateau, 1.0)

    def k(self, progress: float | None, num_classes: int) -> int:
        """K, of the `num_classes` − 1 non-target classes."""
        classes = num_classes - 1
        return min(max(2, math.ceil(self.share(progress) * classes - 1e-9)), classes)  # .07 · 100 is 7.000000000000001

    def __repr__(self) -> str:
        return f"TopKSchedule(start={self.start}, plateau={self.plateau}, phases={self.phases})"


def top_nontarget_classes(teacher_logits: Tensor, target: Tensor, k: int) -> Tensor:
    """(N, K) indices of the K largest teacher logits among the non-target classes; the target is never one of them."""
    others = teacher_logits.detach().scatter(1, target[:, None], -torch.inf)
    return others.topk(k, 1, sorted=False).indices


def masked_divergence(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, k: int, temperature: float) -> Tensor:
    """(N,) NCKD over the kept classes: KL(p̂^T || p̂^S), both distributions renormalised over the same K classes."""
    kept = top_nontarget_classes(teacher_logits, target, k)
    return decompose(student_logits.gather(1, kept), teacher_logits.gather(1, kept), temperature=temperature).within[0]
