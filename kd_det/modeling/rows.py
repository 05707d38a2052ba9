"""The rows that are distilled: the student's logits, with what a loss needs to know of them."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Logits of the student on N rows, of which each has a distribution over C classes of its own."""

    student_logits: Tensor  # (N, C) with gradient; or (B, C, H, W), a row per pixel
    target: Tensor | None  # (N,) or (B, H, W) class indices
    weights: Tensor | None = None  # (N,) weights of the rows in the losses, None for 1
    suffix: str = ""  # of the terms' names: `loss_kd_<term><suffix>`
