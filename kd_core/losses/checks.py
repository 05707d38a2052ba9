"""Checks of what a loss is given. None of them waits for a device: numbers are read only by who says `can_look`."""

import math
from typing import Any

import torch
from torch import Tensor


def as_number(value: Any, name: str) -> float:
    """`value` as a float; a ValueError names it where it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, not {value!r}")
    return number


def is_inference(t: Tensor) -> bool:
    """Whether a tensor was made under `torch.inference_mode`: autograd refuses to save it for a backward pass."""
    return not torch.compiler.is_compiling() and t.is_inference()


def as_count(value: Any, name: str, least: int = 1) -> int:
    """`value`; a ValueError names it where it is not a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, not {value!r}")
    return value


def refuse_row_options(loss: Any) -> None:
    """Raise a ValueError where a loss with terms over the whole batch is asked to work row by row."""
    name = type(loss).__name__
    if loss.reduction != "mean":
        raise ValueError(f"{name} has terms over the whole batch: reduction must be 'mean', not {loss.reduction!r}")
    if loss.chunk_rows is not None:
        raise ValueError(f"{name} has terms over the whole batch: leave chunk_rows out, not {loss.chunk_rows}")


def check_inputs(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor | None,
    row_weights: Tensor | None,
    needs_target: bool,
    can_look: bool,
) -> None:
    """Raise a ValueError that names the first value that does not fit."""
    for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
        if not logits.is_floating_point():
            raise ValueError(f"{name} must be of a floating type, not {logits.dtype}")
    if student_logits.ndim != 2:
        hint = ": kd_core.rows.flatten_rows makes rows of (B, C, H, W) and of (B, L, C)"
        raise ValueError(
            f"student_logits must be (N, C), not {tuple(student_logits.shape)}{hint if student_logits.ndim > 2 else ''}"
        )
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(
            f"teacher_logits are {tuple(teacher_logits.shape)} but student_logits are {tuple(student_logits.shape)}: "
            "both must be (N, C), of the same rows and classes"
        )
    if row_weights is not None and row_weights.shape != student_logits.shape[:1]:
        raise ValueError(f"row_weights must be ({len(student_logits)},), one per row, not {tuple(row_weights.shape)}")
    if target is not None or needs_target:
        check_target(target, *student_logits.shape, can_look)


def check_target(target: Tensor | None, num_rows: int, num_classes: int, can_look: bool) -> None:
    """Raise a ValueError unless `target` holds `num_rows` class indices; their range is checked where one can look."""
    if not isinstance(target, Tensor):
        raise ValueError(f"target must be an (N,) tensor of class indices, not {target!r}: this loss reads the label")
    if target.shape != (num_rows,):
        raise ValueError(f"target must be ({num_rows},), one class index per row, not {tuple(target.shape)}")
    if target.is_floating_point() or target.dtype == torch.bool:
        raise ValueError(f"target must hold class indices of an integer type, not {target.dtype}")
    if can_look and target.device.type == "cpu" and num_rows:
        low, high = (int(bound) for bound in target.long().aminmax())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"target has class {wrong}, but the logits have classes 0 to {num_classes - 1}")


def check_finite(terms: dict[str, Tensor], student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise a ValueError where terms are not finite because one side excludes a class (−inf) and the other does not.

    Only what is not finite costs a look at the logits.
    """
    if all(math.isfinite(term.item()) if term.ndim == 0 else term.isfinite().all() for term in terms.values()):
        return
    if any((logits.isnan() | (logits == torch.inf)).any() for logits in (student_logits, teacher_logits)):
        return  # no class is excluded by that: the training has diverged, and says where
    student_out, teacher_out = student_logits == -torch.inf, teacher_logits == -torch.inf
    for side, out in (("student", student_out), ("teacher", teacher_out)):
        if out.all(1).any():
            raise ValueError(f"{side}_logits have a row of -inf only: no class has a probability")
    for (side, out), (other, other_out), kl in (
        (("student", student_out), ("teacher", teacher_out), "KL(teacher || student)"),
        (("teacher", teacher_out), ("student", student_out), "the reverse KL(student || teacher)"),
    ):
        alone = (out & ~other_out).any(0).nonzero()
        if len(alone):
            raise ValueError(
                f"{side}_logits are -inf for class {int(alone[0])} where {other}_logits are not: {kl} is +inf by "
                "definition; exclude a class on both sides or on neither"
            )
