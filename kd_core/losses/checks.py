"""Checks of what a loss is given. They never wait for a device."""

import math

import torch
from torch import Tensor


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless T is a positive, finite number."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, not {temperature}")


def check_inputs(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, row_weights: Tensor | None, needs_target: bool
) -> None:
    """Raise a ValueError that names the first value that does not fit."""
    if student_logits.ndim != 2 or student_logits.shape[1] < 2:
        raise ValueError(f"student_logits must be (N, C) with C >= 2 classes, not {tuple(student_logits.shape)}; flatten other dimensions into N")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits are {tuple(teacher_logits.shape)} but student_logits are {tuple(student_logits.shape)}: "
            "both must be (N, C) of the same rows and classes"
        )
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, not {logits.dtype}")
    if row_weights is not None and row_weights.shape != student_logits.shape[:1]:
        raise ValueError(f"row_weights must be ({len(student_logits)},), one a row, not {tuple(row_weights.shape)}")
    if target is not None or needs_target:
        check_target(target, *student_logits.shape)


def check_target(target: Tensor | None, num_rows: int, num_classes: int) -> None:
    """Raise a ValueError unless `target` holds `num_rows` class indices; the range is looked at on the CPU only."""
    if not isinstance(target, Tensor):
        raise ValueError(f"target must be an (N,) tensor of class indices, not {target!r}: this loss reads the label")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must hold integer class indices, not {target.dtype}; soft labels have no target class")
    if target.shape != (num_rows,):
        raise ValueError(f"target must be ({num_rows},), one class index a row, not {tuple(target.shape)}")
    if target.device.type == "cpu" and num_rows:
        low, high = (int(bound) for bound in target.aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"target has class {wrong}, but the logits have classes 0 to {num_classes - 1}")
