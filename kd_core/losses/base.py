"""The contract of every distillation loss."""

import inspect
import logging
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from kd_core.losses.checks import as_count, as_number, check_finite, check_inputs, is_inference
from kd_core.losses.chunks import chunked_row_terms
from kd_core.losses.standardize import standardize_logits
from kd_core.schedules import warmup
from kd_core.topk import TopKSchedule
from kd_core.utils.compiling import CompiledOrPlain

logger = logging.getLogger(__name__)

REDUCTIONS = ("mean", "none")


class DistillationLoss(nn.Module):
    """Maps the logits of a student and a teacher to named terms, whose sum is the loss.

        loss(student_logits, teacher_logits, target, progress=None) -> {name: value}
        value = weight · warmup(progress) · coefficient · T² · mean over the rows

    No parameters and no state. Computed in at least float32 whatever the autocast state; the teacher gets no gradient;
    no rows give 0 with a gradient. A logit of −inf excludes a class: it has p = 0. A subclass names its terms and their
    streams (`terms`) and their coefficients (`coefficients`), and computes them row by row (`row_terms`).

    A class that the student alone excludes makes KL(teacher || student) +inf by definition. On the CPU that is an
    error; elsewhere, or without `validate`, the value is inf.

    Args:
        temperature: T of both softmaxes.
        weight: factor of every term.
        warmup: share of training progress over which the weight rises linearly from 0.
        standardize: z-score both logit vectors of a row first (`standardize_logits`).
        topk: dynamic top-k mask of the non-target distribution, for losses that have one (`takes_topk`).
        reduction: "mean" for scalars, "none" for the terms of every row (N,), whose mean is that scalar.
        chunk_rows: compute this many rows at a time, again in the backward pass, for a vocabulary of 100,000 classes:
            the same numbers in less memory. Not used while compiling.
        validate: check the numbers given, where that waits for no device: the range of `target`, and what is infinite.
            Shapes and types are checked always; numbers never while compiling.

    Raises:
        ValueError: T ≤ 0, a warm-up share outside [0, 1], a mask for a loss that has no non-target term, another
            `reduction`, or chunks of less than a row.
    """

    terms: dict[str, str] = {}  # term → stream
    views = 1  # of each image; two in `kd_core.losses.two_view`
    takes_topk = False
    needs_target = True

    def __init__(
        self,
        temperature: float = 4.0,
        weight: float = 1.0,
        warmup: float = 0.0,
        standardize: bool = False,
        topk: TopKSchedule | None = None,
        reduction: str = "mean",
        chunk_rows: int | None = None,
        validate: bool = True,
    ) -> None:
        super().__init__()
        self.temperature = as_number(temperature, "temperature")
        self.weight, self.warmup = as_number(weight, "weight"), as_number(warmup, "warmup")
        self.standardize, self.topk = standardize, topk
        self.reduction, self.validate = reduction, validate
        self.chunk_rows = None if chunk_rows is None else as_count(chunk_rows, "chunk_rows")
        self.compiled_terms: Callable[..., dict[str, Tensor]] | None = None
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        if self.weight < 0:
            raise ValueError(f"weight must not be below 0, and is {weight}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of training progress, in [0, 1], not {warmup}: divide it by max_iter")
        if topk is not None and not self.takes_topk:
            raise ValueError(
                f"{type(self).__name__} has no non-target term for a top-k mask: leave topk out "
                "(in a config: KD.LOSS.TOPK.ENABLED False)"
            )
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")

    def extra_repr(self) -> str:
        """The loss's own parameters, and of those of every loss what is not at its default."""
        own = inspect.signature(type(self)).parameters
        parameters = {**own, **inspect.signature(DistillationLoss).parameters}
        values = ((name, getattr(self, name), p.default) for name, p in parameters.items() if hasattr(self, name))
        return ", ".join(f"{name}={value!r}" for name, value, default in values if name in own or value != default)

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream, "tcg" or "ncg", of every term."""
        return dict(self.terms)

    @property
    def coefficients(self) -> dict[str, float]:
        """The weight of every term among themselves: the paper's α and β, or w."""
        return dict.fromkeys(self.terms, 1.0)

    def check_num_classes(self, num_classes: int) -> None:
        """Raise a ValueError where the loss makes no sense for this number of classes."""
        if num_classes < 2:
            raise ValueError(f"a distribution needs at least 2 classes, not {num_classes}")

    def topk_size(self, progress: float | None, num_classes: int) -> int:
        """K: how many of the C − 1 non-target classes count in this step; all of them without a mask."""
        return num_classes - 1 if self.topk is None else self.topk.k(progress, num_classes)

    def compile(self, **options: Any) -> None:
        """torch.compile all that is done with tensors; falls back to eager. `options` are torch.compile's.

        The numbers that move with progress come from outside, so that a new one compiles nothing: K as a size of its
        own, the warm-up weight in a tensor.
        """
        self.compiled_terms = CompiledOrPlain(self.weighted_terms, type(self).__name__, logger, **options)

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        """Every term row by row, (N,), without coefficient, T² and weight; the inputs are checked and standardized.

        `k` is the `topk_size` of the step.
        """
        raise NotImplementedError

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        progress: float | None = None,
        *,
        row_weights: Tensor | None = None,
        warmup_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted terms: scalars, or (N,) rows where `reduction` is "none".

        Args:
            student_logits: (N, C) of any floating type.
            teacher_logits: (N, C).
            target: (N,) class indices; losses that do not read the label (`needs_target` False) accept None.
            progress: iteration / max_iter; None means "at the end": full weight, all classes.
            row_weights: (N,) weights w of the rows, for Σ w·x / N in place of the mean.
            warmup_weight: warmup(progress) as a scalar tensor, for whoever records the step and runs it again later.

        Raises:
            ValueError: shapes that do not fit, a target out of [0, C), or a loss that is infinite by definition. On
                CUDA a look at the numbers would wait for the device: the indexing kernel asserts the target's range.
        """
        can_look = self.validate and not torch.compiler.is_compiling() and student_logits.device.type == "cpu"
        check_inputs(student_logits, teacher_logits, target, row_weights, self.needs_target, can_look)
        num_classes = student_logits.shape[1]
        self.check_num_classes(num_classes)
        now = warmup(progress, self.warmup) if warmup_weight is None else warmup_weight
        if self.compiled_terms is not None and self.warmup > 0 and warmup_weight is None:
            wide = torch.float32 if student_logits.device.type == "mps" else torch.float64  # which MPS does not have
            now = torch.full((), now, dtype=wide, device=student_logits.device)
        target = target.to(torch.int64, copy=is_inference(target)) if self.needs_target else None
        if row_weights is not None and is_inference(row_weights):  # autograd may not save it
            row_weights = row_weights.clone()
        inputs = (
            student_logits,
            teacher_logits.detach(),
            target,
            self.topk_size(progress, num_classes),
            now,
            row_weights,
        )
        with torch.autocast(student_logits.device.type, enabled=False):
            terms = (self.compiled_terms or self.weighted_terms)(*inputs)
        if can_look:
            check_finite(terms, student_logits, teacher_logits)
        return terms

    def weighted_terms(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        target: Tensor | None,
        k: int,
        warmup_weight: float | Tensor,
        row_weights: Tensor | None,
    ) -> dict[str, Tensor]:
        """`forward` from tensors to tensors: nothing here depends on progress but `k` and `warmup_weight`."""
        row_terms = partial(self.standardized_row_terms, k=k)
        if self.chunk_rows is None or len(student_logits) <= self.chunk_rows or torch.compiler.is_compiling():
            rows = row_terms(student_logits, teacher_logits, target)
        else:
            rows = chunked_row_terms(row_terms, student_logits, teacher_logits, target, self.chunk_rows)
        if row_weights is not None:
            rows = {name: row * row_weights.to(row.dtype) for name, row in rows.items()}
        scale = self.weight * warmup_weight * self.temperature**2
        if self.reduction == "mean":
            scale = scale / max(len(student_logits), 1)
        rows = {name: row * (scale * self.coefficients[name]) for name, row in rows.items()}
        return rows if self.reduction == "none" else {name: row.sum() for name, row in rows.items()}

    def standardized_row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        """`row_terms` of the logits as they are given."""
        if self.standardize:
            student_logits, teacher_logits = standardize_logits(student_logits, teacher_logits)
        return self.row_terms(student_logits, teacher_logits, target, k)


@cache
def warn_no_nontarget_term(name: str) -> None:
    """Say once per process that two classes leave no distribution over the non-target classes."""
    logger.warning(f"{name}: with two classes there is one non-target class, so the non-target term is 0")
