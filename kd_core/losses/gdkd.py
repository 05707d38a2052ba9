"""Generalized decoupled knowledge distillation: partitions drawn by the teacher."""

from typing import Any

import torch
from torch import Tensor

from kd_core.losses.base import DistillationLoss
from kd_core.losses.checks import as_count, as_number
from kd_core.partition import KL_TYPES, Decomposition, decompose
from kd_core.partition_blocks import Group, find_neg_inf, sort_values, work_dtype

AUTO_K_RATIO = 2.0  # released code


class TopPartitionLoss(DistillationLoss):
    """A loss whose top group are the k largest teacher logits. The label is not read: `target` may be None."""

    terms = {"mass": "tcg", "within_top": "ncg", "within_rest": "ncg"}
    needs_target = False
    min_k = 1

    def __init__(self, w0: float, w1: float, w2: float, k: int, temperature: float, **options: Any) -> None:
        super().__init__(temperature, **options)
        self.w0, self.w1, self.w2 = (as_number(w, name) for w, name in ((w0, "w0"), (w1, "w1"), (w2, "w2")))
        self.k = as_count(k, "k", self.min_k)

    @property
    def coefficients(self) -> dict[str, float]:
        return {"mass": self.w0, "within_top": self.w1, "within_rest": self.w2}

    def check_num_classes(self, num_classes: int) -> None:
        super().check_num_classes(num_classes)
        if self.k >= num_classes:
            raise ValueError(f"k is {self.k}, but it must be below the number of classes, {num_classes}")

    def partition(self, student_logits: Tensor, teacher_logits: Tensor) -> Decomposition:
        """The divergence split by the loss's partition; the last two groups are those of the within-terms."""
        raise NotImplementedError

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        parts = self.partition(student_logits, teacher_logits)
        return {"mass": parts.mass, "within_top": parts.within[-2], "within_rest": parts.within[-1]}


class GDKDLoss(TopPartitionLoss):
    """GDKD, arXiv 2512.04625. U1 are the teacher's top-k classes, U2 the rest, M the masses of the two:

        GDKD        = mass + within_top + within_rest
        mass        = w0 · T² · mean KL(M^T || M^S)
        within_top  = w1 · T² · mean KL(p̂^T || p̂^S within U1)
        within_rest = w2 · T² · mean KL(p̂^T || p̂^S within U2)

    The released code clamps the masses to [ε, 1 − ε], ε of their dtype: below it a row's mass has no gradient. Here
    masses are logarithms, and are not clamped.

    Args:
        w0, w1, w2: weights of the terms.
        k: size of U1; with `auto_k` its largest size.
        temperature: T.
        kl: divergence within the groups: "forward" KL(T||S), "reverse" KL(S||T), or "both", their mean. The gradient of
            a reverse KL is as large as the teacher's logit gaps, times T and weight: float16 logits may not hold it.
        auto_k: draw the size of U1 row by row from the teacher's probabilities (`auto_top_group`).
        options: `weight`, `warmup`, `standardize`, … of `DistillationLoss`.

    Raises:
        ValueError: k < 1, k ≥ C, an unknown `kl`, or what `DistillationLoss` refuses.
    """

    def __init__(
        self,
        w0: float = 1.0,
        w1: float = 1.0,
        w2: float = 8.0,
        k: int = 5,
        temperature: float = 4.0,
        kl: str = "forward",
        auto_k: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(w0, w1, w2, k, temperature, **options)
        if kl not in KL_TYPES:
            raise ValueError(f"kl must be one of {', '.join(KL_TYPES)}, not {kl!r}")
        self.kl, self.auto_k = kl, bool(auto_k)

    def partition(self, student_logits: Tensor, teacher_logits: Tensor) -> Decomposition:
        if self.auto_k:
            top = auto_top_group(teacher_logits, self.temperature, self.k)
        else:
            top = Group(teacher_logits.topk(self.k, 1, sorted=False).indices)
        return decompose(student_logits, teacher_logits, [top], self.temperature, self.kl)


class GDKD3Loss(TopPartitionLoss):
    """GDKD with three groups (arXiv 2512.04625, released code): the teacher's top-1, its top-2..k, and the rest.

        GDKD3       = mass + within_top + within_rest
        mass        = w0 · T² · mean KL(M^T || M^S)                        over three masses
        within_top  = w1 · T² · mean KL(p̂^T || p̂^S within top-2..k)
        within_rest = w2 · T² · mean KL(p̂^T || p̂^S within the rest)

    Args:
        w0, w1, w2: weights of the terms.
        k: size of the first two groups together, at least 2.
        temperature: T.
        options: `weight`, `warmup`, `standardize`, … of `DistillationLoss`.

    Raises:
        ValueError: k < 2, k ≥ C, or what `DistillationLoss` refuses.
    """

    min_k = 2

    def __init__(
        self, w0: float = 1.0, w1: float = 1.0, w2: float = 1.0, k: int = 5, temperature: float = 4.0, **options: Any
    ) -> None:
        super().__init__(w0, w1, w2, k, temperature, **options)

    def partition(self, student_logits: Tensor, teacher_logits: Tensor) -> Decomposition:
        top = teacher_logits.topk(self.k, 1).indices
        return decompose(student_logits, teacher_logits, [Group(top[:, :1]), Group(top[:, 1:])], self.temperature)


def auto_top_group(teacher_logits: Tensor, temperature: float, max_k: int, ratio: float = AUTO_K_RATIO) -> Group:
    """A top group of its own size in every row (arXiv 2512.04625, released code).

    Sort a row's probabilities upwards and divide each by the mean of all up to and including it: the top group starts
    at the first quotient ≥ `ratio`. It has at least one class, and at most the `max_k` largest.

    Args:
        teacher_logits: (N, C).
        temperature: T of the probabilities.
        max_k: cap of the group's size, below C.
        ratio: above 1, so that the group is never the whole row.
    """
    num_classes = teacher_logits.shape[1]
    logits = teacher_logits.detach().to(work_dtype(teacher_logits))
    logits_upwards = sort_values(logits)
    p = (logits_upwards / temperature).softmax(1)
    rank = torch.arange(1, num_classes + 1, device=p.device)
    if find_neg_inf(logits_upwards[:, 0]) is not None:
        rank = rank - (logits_upwards == -torch.inf).sum(1, keepdim=True)  # an excluded class has no rank
    starts = p * rank / p.cumsum(1) >= ratio  # 0 / 0, where all up to here has underflowed, is no start
    first = starts.to(torch.uint8).argmax(1, keepdim=True)  # 0 where there is no start: the first quotient is 1
    size = torch.where(first > 0, num_classes - first, 1).clamp_(max=max_k)
    index = logits.topk(max_k, 1).indices
    valid = torch.arange(max_k, device=index.device) < size
    return Group(torch.where(valid, index, index[:, :1]), valid)
