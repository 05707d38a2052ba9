"""Adaptive explicit knowledge transfer. The paper's formula is not published: this is our reading of it."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from kd_core.losses.checks import as_number
from kd_core.losses.target_partition import TargetPartitionLoss
from kd_core.partition import Decomposition


class AEKTLoss(TargetPartitionLoss):
    """AEKT, arXiv 2409.01679, as we read it.

    Explicit knowledge is the teacher's confidence in the target class, implicit knowledge its distribution over the
    others. With r = stop_grad(p_t^T / p_t^S), clipped to `max_ratio`,

        AEKT     = explicit + implicit
        explicit = w_e · T² · mean r · KL(b^T || b^S)         b = [p_t, 1 − p_t]
        implicit = w_i · T² · mean KL(p̂^T || p̂^S)             p̂_i = p_i / (1 − p_t), i ≠ t

    Published: that logit distillation transfers implicit knowledge, that AEKT adds the explicit one, weighted by a
    ratio of teacher and student, and that a layer (`SerializationLayer`) keeps the two tasks apart. Ours: the formula.

    Args:
        explicit_weight: w_e.
        implicit_weight: w_i.
        temperature: T.
        max_ratio: cap of r.
        explicit: another explicit term: maps the `Decomposition` (groups: target, rest) to (N,) rows, without T². It
            has no parameters of its own: under `chunk_rows` they would get no gradient.
        options: `weight`, `warmup`, `standardize`, `topk`, … of `DistillationLoss`; the mask acts on `implicit`.

    Raises:
        ValueError: max_ratio ≤ 0, or what `DistillationLoss` refuses.
    """

    terms = {"explicit": "tcg", "implicit": "ncg"}

    def __init__(
        self,
        explicit_weight: float = 1.0,
        implicit_weight: float = 8.0,
        temperature: float = 4.0,
        max_ratio: float = 10.0,
        explicit: Callable[[Decomposition], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(temperature, **options)
        self.explicit_weight = as_number(explicit_weight, "explicit_weight")
        self.implicit_weight = as_number(implicit_weight, "implicit_weight")
        self.max_ratio = as_number(max_ratio, "max_ratio")
        if self.max_ratio <= 0:
            raise ValueError(f"max_ratio must be above 0, not {max_ratio}")
        self.explicit = explicit

    @property
    def coefficients(self) -> dict[str, float]:
        return {"explicit": self.explicit_weight, "implicit": self.implicit_weight}

    def weighted_tckd(self, parts: Decomposition) -> Tensor:
        """(N,) r · TCKD: a student less confident in the target than its teacher learns from it the more."""
        log_ratio = parts.log_mass_teacher[0] - parts.log_mass_student[0].detach()
        log_ratio = log_ratio.nan_to_num(0.0)  # 0 / 0, where both exclude the target, weights a mass term of 0
        return log_ratio.clamp(max=math.log(self.max_ratio)).exp() * parts.mass

    def row_terms(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, k: int
    ) -> dict[str, Tensor]:
        parts = self.decompose(student_logits, teacher_logits, target, k)
        explicit = self.explicit or self.weighted_tckd
        return {"explicit": explicit(parts), "implicit": parts.within[1]}
