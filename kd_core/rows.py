"""Rows from logits with a class axis: images, pixels, tokens."""

from typing import Any

import torch
from torch import Tensor


def flatten_rows(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, ignore_index: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows (N, C), (N, C) and (N,) that a loss takes, N being all places that have a distribution of their own.

        student, teacher, target = flatten_rows(student_logits, teacher_logits, target, ignore_index=255)

    | logits       | target    | N         |                                          |
    |--------------|-----------|-----------|------------------------------------------|
    | (N, C)       | (N,)      | N         | images, ROIs                             |
    | (B, C, H, W) | (B, H, W) | B · H · W | pixels; a bare reshape would mix classes |
    | (B, L, C)    | (B, L)    | B · L     | tokens, anchors                          |

    Args:
        student_logits: as in the table.
        teacher_logits: of the same shape.
        target: class indices, or None, as for a loss that reads no label; then no row is left out.
        ignore_index: rows of this target are left out of all three. Counting them waits for the device.

    Raises:
        ValueError: another number of dimensions, or shapes that do not fit.
    """
    shape = tuple(student_logits.shape)
    if tuple(teacher_logits.shape) != shape:
        raise ValueError(
            f"teacher_logits are {tuple(teacher_logits.shape)} but student_logits are {shape}: both must be of the "
            "same rows and classes (interpolate one of two maps first)"
        )
    if len(shape) not in (2, 3, 4):
        raise ValueError(f"logits must be (N, C), (B, C, H, W) or (B, L, C), not {shape}")
    places = (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]
    if target is not None and tuple(target.shape) != places:
        raise ValueError(
            f"target must be {places} for logits {shape}, one class index per row, not {tuple(target.shape)}"
        )
    last = (side.movedim(1, -1) if len(shape) == 4 else side for side in (student_logits, teacher_logits))
    if target is None or ignore_index is None:
        student, teacher = (side.flatten(0, -2) for side in last)
        return student, teacher, None if target is None else target.flatten()
    kept = target != ignore_index
    student, teacher = (KeepRows.apply(side, kept) for side in last)
    return student, teacher, target[kept]


class KeepRows(torch.autograd.Function):
    """Rows (N, C) of logits (…, C), where `kept` (…) is true: one copy of them, also of a map whose classes come first.

    Indexing would keep the rows' numbers for the backward pass, and add up gradients of rows that occur once.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        # Those of the logits, or of a dense tensor where these have gaps or share memory, as an expanded tensor does.
        ctx.strides = torch.empty_like(logits, device="meta").stride()
        return logits[kept]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        shape = (*kept.shape, gradient.shape[-1])
        full = gradient.new_empty_strided(shape, ctx.strides).zero_()
        full[kept] = gradient
        return full, None
