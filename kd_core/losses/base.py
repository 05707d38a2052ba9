"""The contract of every distillation loss."""

import logging
from functools import cache

import torch
from torch import Tensor, nn

from kd_core.losses.checks import as_number, check_inputs
from kd_core.losses.standardize import standardize_logits
from kd_core.schedules import warmup as warmup_weight
from kd_core.topk import TopKSchedule

logger = logging.getLogger(__name__)


class DistillationLoss(nn.Module):
    """Maps the logits of a student and a teacher to named scalar terms, whose sum is the loss.

        loss(student_logits, teacher_logits, target, progress=None) -> {name: value}
        value = weight · warmup(progress) · coefficient · T² · mean over the rows

    No parameters and no state. Computed in at least float32 whatever the autocast state; the teacher gets no gradient;
    no rows give 0 with a gradient. A subclass names its terms and their streams (`terms`) and their coefficients
    (`coefficients`), and computes them row by row (`row_terms`).

    Args:
        temperature: T of both softmaxes.
        weight: factor of every term.
        warmup: share of training progress over which the weight rises linearly from 0.
        standardize: z-score both logit vectors of a row first (`standardize_logits`).
        topk: dynamic top-k mask of the non-target distribution, for losses that have one (`takes_topk`).

    Raises:
        ValueError: T ≤ 0, a warm-up share outside [0, 1], or a mask for a loss that has no non-target term.
    """

    terms: dict[str, str] = {}  # term → stream
    takes_topk = False
    needs_target = True

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 1.0,
        warmup: float = 0.0,
        standardize: bool = False,
        topk: TopKSchedule | None = None,
    ) -> None:
        super().__init__()
        self.temperature = as_number(temperature, "temperature")
        self.weight, self.warmup = as_number(weight, "weight"), as_number(warmup, "warmup")
        self.standardize, self.topk = standardize, topk
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of training progress, in [0, 1], not {warmup}: divide it by max_iter")
        if topk is not None and not self.takes_topk:
            raise ValueError(f"{type(self).__name__} has no non-target term for a top-k mask: leave topk out")

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream, "tcg" or "ncg", of every term."""
        return dict(self.terms)

    @property
    def coefficients(self) -> dict[str, float]:
        """The weight of every term among themselves: the paper's α and β, or w."""
        return dict.fromkeys(self.terms, 1.0)

    def check_num_classes(self, num_classes: int) -> None:
        """Raise a ValueError where the loss makes no sense for so many classes."""
        if num_classes < 2:
            raise ValueError(f"a distribution needs at least 2 classes, not {num_classes}")

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, progress: float | None
    ) -> dict[str, Tensor]:
        """Every term row by row, (N,), without coefficient, T² and weight; the inputs are checked and standardized."""
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        progress: float | None = None,
        *,
        row_weights: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted scalar terms.

        Args:
            student_logits: (N, C) of any floating type.
            teacher_logits: (N, C).
            target: (N,) class indices; losses that do not read the label (`needs_target` False) accept None.
            progress: iteration / max_iter; None means "at the end": full weight, all classes.
            row_weights: (N,) weights w of the rows, for Σ w·x / N in place of the mean.

        Raises:
            ValueError: shapes that do not fit, or a target out of [0, C). On CUDA a look at the range would wait for
                the device, so there the indexing kernel asserts it.
        """
        check_inputs(student_logits, teacher_logits, target, row_weights, self.needs_target)
        self.check_num_classes(student_logits.shape[1])
        weight = self.weight * warmup_weight(progress, self.warmup)
        scale = weight * self.temperature**2 / max(len(student_logits), 1)
        with torch.autocast(student_logits.device.type, enabled=False):
            teacher_logits = teacher_logits.detach()
            if self.standardize:
                student_logits, teacher_logits = standardize_logits(student_logits, teacher_logits)
            target = target.long() if self.needs_target else None
            rows = self.row_terms(student_logits, teacher_logits, target, progress)
            if row_weights is not None:
                rows = {name: row * row_weights.to(row.dtype) for name, row in rows.items()}
            factors = {name: scale * coefficient for name, coefficient in self.coefficients.items()}
            return {name: (row * factors[name]).sum() for name, row in rows.items()}


@cache
def note_void(name: str) -> None:
    """Say once a process that two classes leave no distribution over the non-target classes."""
    logger.warning(f"{name}: with two classes there is one non-target class, so the non-target term is 0")
