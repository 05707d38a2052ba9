"""One block of a class partition: the logits of a group on both sides, their comparison, and the gradient of that.

What `kd_core.partition` is made of. Blocks are (N, K), of the student and of the teacher.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Group(NamedTuple):
    """Classes of one group, row by row.

    index: (N, K) class indices, no class twice in a row.
    valid: (N, K) bool, for rows of different sizes: entries that are False do not count; they repeat a class that does.
    """

    index: Tensor
    valid: Tensor | None = None


class KLWeights(NamedTuple):
    """Weights of the forward KL(T||S) and the reverse KL(S||T) within groups. That of the masses is always forward."""

    forward: float
    reverse: float


class Block(NamedTuple):
    """What comes of comparing the two sides of a block.

    p_student, p_teacher: (N, K) softmaxes.
    centred_log_ratio: (N, K) log(p̂^S / p̂^T) − KL(p̂^S || p̂^T), which the gradient of the reverse KL needs, else None.
    rows: (5, N) the divergence; the largest logit of student and teacher; the log of the largest p̂ of either.
    """

    p_student: Tensor
    p_teacher: Tensor
    centred_log_ratio: Tensor | None
    rows: Tensor


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype losses are computed in: float64 where one side is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def split(
    student: Tensor, teacher: Tensor, groups: Sequence[Group], temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """The logits z/T of every group and, last, of the rest, which has all C columns: student, teacher, void.

    All fresh memory. A class of another group is −inf on both sides, where void says: columns (N, V) or a mask (N, K).
    """
    dtype = work_dtype(student, teacher)
    sides = [scaled(side, dtype, temperature) for side in (student, teacher)]
    for index, valid in groups:
        block = [side.gather(1, index) for side in sides]
        if valid is None:
            yield *block, None
        else:
            yield *(side.masked_fill_(~valid, -torch.inf) for side in block), ~valid
    listed = torch.cat([group.index for group in groups], 1) if groups else None
    if listed is not None:
        sides = [put(side, listed, -torch.inf) for side in sides]
    yield *sides, listed


def compare(student: Tensor, teacher: Tensor, void: Tensor | None, kl: KLWeights) -> Block:
    """Compare the two sides of a block, which are overwritten: forward KL keeps three such buffers alive, no more."""
    if student.shape[1] == 1:  # one class has the distribution (1) on both sides
        zeros, ones = torch.zeros_like(student), torch.ones_like(student)
        return Block(ones, ones, None, torch.stack([zeros, student, teacher, zeros, zeros]).squeeze(2))
    largest = row_maximum(student), row_maximum(teacher)
    student.sub_(largest[0])
    teacher.sub_(largest[1])
    p_teacher = teacher.softmax(1)
    log_ratio = clear(teacher.sub_(student), void)  # log(p̂^T / p̂^S) up to a constant of the row
    if kl.reverse:
        p_student = student.softmax(1)
    else:
        gap = log_ratio.mul_(p_teacher).sum(1, keepdim=True)
        p_student = torch.softmax(student, 1, out=log_ratio)
    # The largest logit is 0 now, so its p̂ is 1 / Σ exp, which is never 0.
    log_peaks = row_maximum(p_student).log_(), row_maximum(p_teacher).log_()
    offset = log_peaks[1] - log_peaks[0]
    if kl.reverse:
        divergence, log_ratio = both_divergences(log_ratio.add_(offset).neg_(), p_student, p_teacher, kl)
    else:
        divergence, log_ratio = gap.add_(offset).clamp_min_(0), None  # below 0 by rounding only
    return Block(p_student, p_teacher, log_ratio, torch.stack([divergence, *largest, *log_peaks]).squeeze(2))


def both_divergences(log_ratio: Tensor, p_student: Tensor, p_teacher: Tensor, kl: KLWeights) -> tuple[Tensor, Tensor]:
    """(N, 1) weighted divergence out of log_ratio = log(p̂^S / p̂^T), and that less the reverse KL, in its memory."""
    forward = (log_ratio * p_teacher).sum(1, keepdim=True).neg_()
    reverse = (log_ratio * p_student).sum(1, keepdim=True)
    divergence = kl.forward * forward.clamp_min_(0) + kl.reverse * reverse.clamp_min(0)
    return divergence, log_ratio.sub_(reverse)


def block_gradient(block: Sequence[Tensor | None], kl: KLWeights, slope: Tensor, grad: Tensor | None) -> Tensor:
    """(N, K) gradient with respect to a block's z/T.

    Args:
        block: the first three fields of the `Block`.
        kl: the weights it was compared with.
        slope: (N,) gradient that comes down on the log mass of the block.
        grad: (N,) gradient that comes down on its divergence, or None.
    """
    p_student, p_teacher, centred_log_ratio = block
    if grad is None:
        return p_student * slope[:, None]
    gradient = (p_student - p_teacher).mul_((kl.forward * grad)[:, None])  # exactly 0 for equal sides
    gradient.addcmul_(p_student, slope[:, None])
    if centred_log_ratio is not None:
        gradient.addcmul_(centred_log_ratio * p_student, (kl.reverse * grad)[:, None])
    return gradient


def scaled(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """A fresh copy of z/T: half precision is widened before it is divided."""
    return logits / temperature if logits.dtype == dtype else logits.to(dtype).div_(temperature)


def put(values: Tensor, index: Tensor, value: float) -> Tensor:
    """`values.scatter_(1, index, value)`, which on a CPU is four times slower with a number than with a tensor."""
    return values.scatter_(1, index, values.new_full(index.shape, value))


def clear(log_ratio: Tensor, void: Tensor | None) -> Tensor:
    """Set what came of −inf − (−inf) to 0, in place."""
    if void is None:
        return log_ratio
    return log_ratio.masked_fill_(void, 0.0) if void.dtype == torch.bool else put(log_ratio, void, 0.0)


def row_maximum(values: Tensor) -> Tensor:
    """`values.amax(1, keepdim=True)`, which on a CPU takes most of its time for the ragged end of a short row.

    Two windows that overlap have no such end: at 81 classes they take half the time.
    """
    classes = values.shape[1]
    width = classes // 32 * 32
    if width in (0, classes) or classes > 256 or values.device.type != "cpu" or torch.compiler.is_compiling():
        return values.amax(1, keepdim=True)
    return torch.maximum(values[:, :width].amax(1, keepdim=True), values[:, -width:].amax(1, keepdim=True))
