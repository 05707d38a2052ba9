"""Checks of what a loss is given. None of them waits for a device."""

import math
from typing import Any

import torch
from torch import Tensor


def as_number(value: Any, name: str) -> float:
    """`value` as a float; a ValueError names it where it is no finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return number


def check_inputs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    row_weights: Tensor | None,
    needs_target: bool,
) -> None:
    """Raise a ValueError that names the first value that does not fit."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, not {logits.dtype}")
    if student_logits.ndim != 2:
        raise ValueError(f"student_logits must be (N, C), not {tuple(student_logits.shape)}; flatten the rows into N")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits are {tuple(teacher_logits.shape)} but student_logits are {tuple(student_logits.shape)}: "
            "both must be (N, C), of the same rows and classes"
        )
    if row_weights is not None and row_weights.shape != student_logits.shape[:1]:
        raise ValueError(f"row_weights must be ({len(student_logits)},), one a row, not {tuple(row_weights.shape)}")
    if target is not None or needs_target:
        check_target(target, *student_logits.shape)


def check_target(target: Tensor | None, num_rows: int, num_classes: int) -> None:
    """Raise a ValueError unless `target` holds `num_rows` class indices; on the CPU their range is checked too."""
    if not isinstance(target, Tensor):
        raise ValueError(f"target must be an (N,) tensor of class indices, not {target!r}: this loss reads the label")
    if target.shape != (num_rows,):
        raise ValueError(f"target must be ({num_rows},), one class index a row, not {tuple(target.shape)}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must hold class indices of an integer type, not {target.dtype}")
    if target.device.type == "cpu" and num_rows:
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"target has class {wrong}, but the logits have classes 0 to {num_classes - 1}")
