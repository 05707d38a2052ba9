"""The contract of every distillation loss."""

import logging
from functools import cache

import torch
from torch import Tensor, nn

from kd_core.losses.checks import check_inputs, check_temperature
from kd_core.losses.standardize import standardize_logits
from kd_core.schedules import warmup
from kd_core.topk import TopKSchedule

logger = logging.getLogger(__name__)


class DistillationLoss(nn.Module):
    """Maps the logits of a student and a teacher to named scalar terms whose sum is the loss.

        loss(student_logits, teacher_logits, target, progress=None) -> {term: weight · warm-up · coefficient · T² · mean over rows}

    No parameters, no state. Computed in at least float32 whatever the autocast state; the teacher gets no gradient. No rows give 0
    with a gradient. A subclass says which terms there are (`terms`: name → stream), their coefficients, and computes their rows.

    Args:
        temperature: T of both softmaxes.
        weight: factor of every term.
        warmup: share of training progress over which the weight rises linearly from 0.
        standardize: z-score both logit vectors of a row first (`standardize_logits`).
        topk: dynamic top-k mask on the non-target distribution, where the loss has one.

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
        check_temperature(temperature)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup is a share of training progress, in [0, 1], not {warmup}; divide iterations by max_iter")
        if topk is not None and not self.takes_topk:
            raise ValueError(f"{type(self).__name__} has no non-target term, so it takes no top-k mask: leave topk out")
        self.temperature, self.weight, self.warmup = float(temperature), float(weight), float(warmup)
        self.standardize, self.topk = standardize, topk

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream ("tcg" or "ncg") of every term."""
        return dict(self.terms)

    @property
    def coefficients(self) -> dict[str, float]:
        """The loss's own weight of every term, the paper's α, β or w."""
        return dict.fromkeys(self.terms, 1.0)

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, progress: float | None
    ) -> dict[str, Tensor]:
        """Every term row by row, (N,), without coefficient, T² and weight. Inputs are checked and, if asked for, standardized."""
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
            target: (N,) class indices. Losses that do not read the label (`needs_target` is False) accept None.
            progress: iteration / max_iter; None means "at the end": full weight, all classes.
            row_weights: (N,) weights w of the rows, Σ w·x / N in place of the mean.

        Raises:
            ValueError: shapes that do not fit, a target out of [0, C). On CUDA the range is not looked at, which would wait for the
                device: the indexing kernel asserts there.
        """
        check_inputs(student_logits, teacher_logits, target, row_weights, self.needs_target)
        scale = self.weight * warmup(progress, self.warmup) * self.temperature**2 / max(len(student_logits), 1)
        with torch.autocast(student_logits.device.type, enabled=False):
            teacher_logits = teacher_logits.detach()
            if self.standardize:
                student_logits, teacher_logits = standardize_logits(student_logits, teacher_logits)
            target = target.long() if self.needs_target else None
            rows = self.row_terms(student_logits, teacher_logits, target, progress)
            if row_weights is not None:
                rows = {name: row * row_weights for name, row in rows.items()}
            return {name: (row * (scale * self.coefficients[name])).sum() for name, row in rows.items()}


@cache
def note_void(name: str) -> None:
    """Say once a process that with two classes there is no distribution over the non-target classes."""
    logger.warning(f"{name}: one non-target class has only one distribution, so the non-target term is 0")
