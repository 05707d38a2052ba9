"""Row terms computed a few rows at a time, so that no intermediate result has all rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kd_core.losses.checks import is_inference

RowTerms = Callable[[Tensor, Tensor, Tensor | None], dict[str, Tensor]]


def chunked_row_terms(
    row_terms: RowTerms, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None, chunk_rows: int
) -> dict[str, Tensor]:
    """`row_terms(student_logits, teacher_logits, target)` by chunks of rows: the same values and gradients.

    Nothing of a chunk is kept: the backward pass computes it again and writes its gradient in place. Beside the inputs
    the peak is the gradient and one chunk's intermediate results.

    Args:
        row_terms: maps (n, C), (n, C) and (n,) to named terms (n,), each row by itself.
        student_logits: (N, C).
        teacher_logits: (N, C); no gradient flows into it.
        target: (N,), or None.
        chunk_rows: n, the most rows of a chunk.
    """
    names: list[str] = []
    values = _Chunked.apply(student_logits, teacher_logits, target, row_terms, chunk_rows, names)
    return dict(zip(names, values, strict=True))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None,
        row_terms: RowTerms,
        chunk_rows: int,
        names: list[str],
    ) -> tuple[Tensor, ...]:
        chunks = [row_terms(*rows) for rows in _split(student, teacher, target, chunk_rows)]
        names += chunks[0]
        ctx.teacher = teacher if is_inference(teacher) else None
        ctx.save_for_backward(student, teacher if ctx.teacher is None else None, target)
        ctx.row_terms, ctx.chunk_rows = row_terms, chunk_rows
        ctx.set_materialize_grads(False)
        return tuple(torch.cat([chunk[name] for chunk in chunks]) for name in names)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        student, teacher, target = ctx.saved_tensors
        teacher = ctx.teacher if teacher is None else teacher
        wanted = [number for number, grad in enumerate(grads) if grad is not None]
        gradient = torch.empty_like(student) if wanted else torch.zeros_like(student)
        parts = [grads[number].split(ctx.chunk_rows) for number in wanted]
        pieces = zip(_split(student, teacher, target, ctx.chunk_rows), gradient.split(ctx.chunk_rows), strict=True)
        for number, ((rows, *others), piece) in enumerate(pieces if wanted else ()):
            rows = rows.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
                terms = list(ctx.row_terms(rows, *others).values())
            upstream = [part[number] for part in parts]
            piece.copy_(torch.autograd.grad([terms[index] for index in wanted], rows, upstream)[0])
        return gradient, *(None for _ in range(5))


def _split(
    student: Tensor, teacher: Tensor, target: Tensor | None, chunk_rows: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    sides = student.split(chunk_rows), teacher.split(chunk_rows)
    targets = [None] * len(sides[0]) if target is None else target.split(chunk_rows)
    return list(zip(*sides, targets, strict=True))
