"""Losses that compare two views of every image, a weak and a strong augmentation of it: MLKD and CRLD."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kd_core.losses.checks import as_number, check_inputs, refuse_row_options
from kd_core.losses.standardize import standardize_logits
from kd_core.losses.target_partition import TargetPartitionLoss
from kd_core.partition_blocks import work_dtype

RELEASED_ON_WEAK = 3  # MLKD's released code takes weak logits for the strong view from the fourth temperature on


class TwoViewLoss(TargetPartitionLoss):
    """A loss of the logits of two views:

        loss((student_weak, student_strong), (teacher_weak, teacher_strong), target, progress) -> {term: value}

    Every divergence of a row is split into its target and its non-target part, so DeepKD has its streams. By default
    the split is KD's, exact per row: tckd + (1 − p_t^T) · nckd. With `alpha` or `beta` it is DKD's, α·tckd + β·nckd, as
    in DeepKD's released settings (α 1; β 2 on CIFAR-100, .5 on ImageNet).

    Args:
        temperature: T.
        alpha, beta: α and β, 1 where only the other is given; None on both sides is KD's split.
        released: the value of the released code where the formula has another.
        options: `weight`, `warmup`, `standardize`, `topk`, … of `TargetPartitionLoss`; the mask acts on the nckd terms.

    Raises:
        ValueError: `reduction` "none" or `chunk_rows`, since not every term is one of rows, or what
            `TargetPartitionLoss` refuses.
    """

    views = 2

    def __init__(
        self,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        released: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        refuse_row_options(self)
        self.decoupled = alpha is not None or beta is not None
        self.alpha = as_number(1.0 if alpha is None else alpha, "alpha")
        self.beta = as_number(1.0 if beta is None else beta, "beta")
        self.released = bool(released)

    def forward(
        self,
        student_logits: Sequence[Tensor],
        teacher_logits: Sequence[Tensor],
        target: Tensor | None,
        progress: float | None = None,
        *,
        warmup_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted scalar terms of logits (weak, strong), each (N, C); the rest as `DistillationLoss.forward`.

        Raises:
            ValueError: anything but two views on a side, views of different shapes, or what `DistillationLoss` refuses.
        """
        sides = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        for name, views in sides.items():
            if len(views) != 2 or any(not isinstance(view, Tensor) or view.ndim != 2 for view in views):
                shapes = [tuple(view.shape) if isinstance(view, Tensor) else view for view in views]
                raise ValueError(f"{name} must be (weak, strong), two (N, C) tensors, not {shapes}")
        for student_view, teacher_view in zip(student_logits, teacher_logits, strict=True):
            check_inputs(student_view, teacher_view, target, None, self.needs_target, can_look=False)
        if student_logits[0].shape != student_logits[1].shape:
            shapes = " and ".join(str(tuple(view.shape)) for view in student_logits)
            raise ValueError(f"the weak and the strong view must have one shape, not {shapes}")
        both = (torch.cat(tuple(views)) for views in sides.values())
        return super().forward(*both, _repeated(target, 2), progress, warmup_weight=warmup_weight)

    def split_rows(self, student: Tensor, teacher: Tensor, target: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """(R,) the target and the non-target part of KL(p^T || p^S), with α and β."""
        parts = self.decompose(student, teacher, target, k)
        nckd = parts.within[1] if self.decoupled else parts.log_mass_teacher[1].exp() * parts.within[1]
        return self.alpha * parts.mass, self.beta * nckd


class MLKDLoss(TwoViewLoss):
    """Multi-level logit distillation (CVPR 2023), summed over the views and over T in `temperatures`:

        MLKD  = tckd + nckd + class + batch
        tckd + nckd = weight · Σ T² · Σ_rows m_i · KL(p_i^T || p_i^S) / N
        class = class_weight · weight · Σ Σ_ij m_j · (P_TᵀP_T − P_SᵀP_S)_ij² / C    P: (N, C) probabilities at T
        batch = batch_weight · weight · Σ Σ_ij m_j · (P_TP_Tᵀ − P_SP_Sᵀ)_ij² / N

    On the weak view m_i is 1 for rows whose teacher confidence (largest probability at T = 1) is at most the batch's
    median, and m_j for classes whose summed teacher probability is at most theirs; on the strong view all count.
    "class" and "batch" are in stream "tog", as in DeepKD's released code. `standardize` acts on the rows' divergences.
    P_TᵀP_T sums over the batch, so "class" grows like (N / C)²: with 64 images it is a hundred times as large for 10
    classes as for CIFAR-100's. `class_weight` (ours) is there to make up for it.

    `released` is the value of the released code: a mask multiplies what has been averaged already, so it scales by the
    share that is kept; the strong view has no class and batch terms; and from the fourth temperature on its rows are
    those of the weak view.

    Args:
        temperatures: T of every level.
        weight: factor of all terms.
        class_weight, batch_weight: further factors of "class" and "batch"; 1 in the paper.
        options: `alpha`, `beta`, `released` of `TwoViewLoss`, and its `warmup`, `standardize`, `topk`.

    Raises:
        ValueError: no temperature, or one that is not above 0.
    """

    terms = {"tckd": "tcg", "nckd": "ncg", "class": "tog", "batch": "tog"}

    def __init__(
        self,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
        weight: float = 0.5,
        class_weight: float = 1.0,
        batch_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(1.0, weight=weight, **options)  # rows are divided by their own T before they are compared
        self.class_weight = as_number(class_weight, "class_weight")
        self.batch_weight = as_number(batch_weight, "batch_weight")
        self.temperatures = tuple(as_number(temperature, "temperatures") for temperature in temperatures)
        if not self.temperatures or min(self.temperatures) <= 0:
            raise ValueError(f"temperatures must be one or more numbers above 0, not {list(temperatures)}")

    @property
    def coefficients(self) -> dict[str, float]:
        return {"tckd": self.alpha, "nckd": self.beta, "class": self.class_weight, "batch": self.batch_weight}

    def weighted_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        k: int,
        warmup_weight: float | Tensor,
        row_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        num_rows, num_classes = len(student_logits) // 2, student_logits.shape[1]
        dtype = work_dtype(student_logits, teacher_logits)
        raw = student_logits.to(dtype), teacher_logits.to(dtype)
        tempered = [self.levels(side) for side in raw]
        rows = tempered
        if self.standardize:
            rows = [self.levels(side) for side in standardize_logits(student_logits, teacher_logits)]
        if self.released:
            rows = [self.released_rows(side) for side in rows]
        row_mask, class_mask = self.masks(raw[1][:num_rows])
        scale = self.weight * warmup_weight

        levels = len(self.temperatures)
        flat = [side.reshape(-1, num_classes) for side in rows]
        parts = self.split_rows(*flat, _repeated(target, levels), k)
        counted = torch.stack([row_mask, torch.ones_like(row_mask)])
        weights = torch.stack([counted * t**2 for t in self.temperatures])  # (levels, views, N)
        per_row = scale / max(num_rows, 1)
        tckd, nckd = ((part.view(levels, 2, num_rows) * weights * per_row).sum() for part in parts)

        views = 1 if self.released else 2
        student, teacher = (side[:, :views].softmax(3) for side in tempered)
        classes = (teacher.mT @ teacher - student.mT @ student).square().sum(3)
        batch = (teacher @ teacher.mT - student @ student.mT).square().sum(3)
        return {
            "tckd": tckd,
            "nckd": nckd,
            "class": self.masked_sum(classes * (self.class_weight * scale / num_classes), class_mask),
            "batch": self.masked_sum(batch * (self.batch_weight * per_row), row_mask),
        }

    def levels(self, logits: Tensor) -> Tensor:
        """z / T of both views at every T, (levels, 2, N, C), out of (2N, C)."""
        return torch.stack([logits / t for t in self.temperatures]).unflatten(1, (2, -1))

    def released_rows(self, rows: Tensor) -> Tensor:
        """`rows` with the weak view in place of the strong one from the fourth temperature on."""
        weak = rows[RELEASED_ON_WEAK:, :1].expand(-1, 2, -1, -1)
        return torch.cat([rows[:RELEASED_ON_WEAK], weak])

    def masks(self, teacher_weak: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) and (C,) weights of the weak view's rows and classes."""
        p = teacher_weak.softmax(1)
        masks = []
        for confidence in (p.amax(1), p.sum(0)):
            kept = (confidence <= confidence.median()).to(p.dtype)  # the lower median: the same set as with the mean
            masks.append(kept.mean().expand_as(kept) if self.released else kept)
        return masks[0], masks[1]

    def masked_sum(self, values: Tensor, mask: Tensor) -> Tensor:
        """Σ over levels and views of (levels, views, n) values, the weak view's weighted by the mask."""
        return (values[:, 0] * mask).sum() + values[:, 1:].sum()


class CRLDLoss(TwoViewLoss):
    """Cross-view consistency (CRLD, ACM MM 2024), KL_ab of student view a and teacher view b, rows with a mask m:

        CRLD   = within_tckd + within_nckd + cross_tckd + cross_nckd
        within = within_weight · T² · Σ m^within · (KL_weak,weak + KL_strong,strong) / N
        cross  = cross_weight  · T² · Σ m^cross  · (KL_strong,weak + KL_weak,strong) / N

    m^within is 1 where the teacher's confidence in its *weak* view (largest probability at T = 1) is at least
    `within_threshold`, m^cross where that in its *strong* view is at least `cross_threshold`.

    Args:
        temperature: T.
        within_weight, cross_weight: weights of the two groups of terms.
        within_threshold, cross_threshold: least confidences; 0 keeps every row.
        options: `alpha`, `beta` of `TwoViewLoss`, and its `weight`, `warmup`, `standardize`, `topk`. `released` changes
            nothing: the released value is the formula's.
    """

    terms = {"within_tckd": "tcg", "within_nckd": "ncg", "cross_tckd": "tcg", "cross_nckd": "ncg"}

    def __init__(
        self,
        temperature: float = 4.0,
        within_weight: float = 2.0,
        cross_weight: float = 0.5,
        within_threshold: float = 0.9,
        cross_threshold: float = 0.2,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        self.within_weight = as_number(within_weight, "within_weight")
        self.cross_weight = as_number(cross_weight, "cross_weight")
        self.within_threshold = as_number(within_threshold, "within_threshold")
        self.cross_threshold = as_number(cross_threshold, "cross_threshold")
        for name in ("within_threshold", "cross_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a confidence, in [0, 1], not {getattr(self, name)}")

    @property
    def coefficients(self) -> dict[str, float]:
        groups = {"within": self.within_weight, "cross": self.cross_weight}
        parts = {"tckd": self.alpha, "nckd": self.beta}
        return {f"{group}_{part}": w * v for group, w in groups.items() for part, v in parts.items()}

    def weighted_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        k: int,
        warmup_weight: float | Tensor,
        row_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        num_rows = len(student_logits) // 2
        dtype = work_dtype(student_logits, teacher_logits)
        weak, strong = teacher_logits.to(dtype).softmax(1).amax(1).unflatten(0, (2, -1))
        masks = torch.stack([weak >= self.within_threshold, strong >= self.cross_threshold]).to(dtype)
        # Students weak, strong, strong, weak beside teachers weak, strong, weak, strong.
        student = torch.cat([student_logits, student_logits.roll(num_rows, 0)])
        teacher = teacher_logits.repeat(2, 1)
        if self.standardize:
            student, teacher = standardize_logits(student, teacher)
        parts = self.split_rows(student, teacher, _repeated(target, 2), k)
        scale = self.weight * warmup_weight * self.temperature**2 / max(num_rows, 1)
        terms = {}
        for name, part in zip(("tckd", "nckd"), parts, strict=True):
            within, cross = part.view(2, 2, num_rows).sum(1) * masks
            terms[f"within_{name}"] = (within * (scale * self.within_weight)).sum()
            terms[f"cross_{name}"] = (cross * (scale * self.cross_weight)).sum()
        return {name: terms[name] for name in self.terms}


def _repeated(target: Tensor | None, times: int) -> Tensor | None:
    return None if target is None else target.repeat(times)
