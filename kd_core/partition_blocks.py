"""One block of a class partition on both sides: its logits, their comparison, and the gradient of that.

What `kd_core.partition` is made of. Blocks are (N, K); side 0 is the student, side 1 the teacher.
"""

from collections.abc import Sequence
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


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype losses are computed in: float64 where one side is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


class Sides:
    """The logits z/T of student and teacher, block by block: the listed groups and, last, the rest."""

    def __init__(self, student: Tensor, teacher: Tensor, groups: Sequence[Group], temperature: float) -> None:
        self.logits, self.groups, self.temperature = (student, teacher), groups, temperature
        self.dtype = work_dtype(student, teacher)
        self.listed = torch.cat([group.index for group in groups], 1) if groups else None

    def block(self, g: int, side: int) -> Tensor:
        """(N, K) logits of block g in fresh memory, −inf for classes of another one. The rest has all C columns."""
        if g == len(self.groups):
            block = self.scaled(self.logits[side])
            return block if self.listed is None else put(block, self.listed, -torch.inf)
        index, valid = self.groups[g]
        block = self.scaled(self.logits[side].gather(1, index))
        return block if valid is None else block.masked_fill_(~valid, -torch.inf)

    def void(self, g: int) -> Tensor | None:
        """Where block g is −inf: columns (N, V), a mask (N, K), or None."""
        if g == len(self.groups):
            return self.listed
        valid = self.groups[g].valid
        return None if valid is None else ~valid

    def scaled(self, logits: Tensor) -> Tensor:
        """A fresh copy of z/T: half precision is widened before it is divided."""
        if logits.dtype == self.dtype:
            return logits / self.temperature
        return logits.to(self.dtype).div_(self.temperature)


class Comparison(NamedTuple):
    """What comes of comparing a block.

    rows: (5, N) the divergence; the largest logit of student and teacher; the log of the largest p̂ of either.
    p_student, p_teacher: (N, K) softmaxes.
    """

    rows: Tensor
    p_student: Tensor
    p_teacher: Tensor


def compare(student: Tensor, teacher: Tensor, void: Tensor | None, kl: KLWeights, out: Tensor | None) -> Comparison:
    """Compare the two sides of a block, which are overwritten; p̂^S goes to `out`, where that is given.

    Forward KL keeps three buffers of the size of the block alive, the two sides included.
    """
    if student.shape[1] == 1:  # one class has the distribution (1) on both sides
        zeros, ones = torch.zeros_like(student), torch.ones_like(student)
        return Comparison(torch.stack([zeros, student, teacher, zeros, zeros]).squeeze(2), ones, ones)
    largest = row_maximum(student), row_maximum(teacher)
    student.sub_(largest[0])
    teacher.sub_(largest[1])
    p_teacher = teacher.softmax(1)
    log_ratio = log_quotient(teacher, student, void)  # of p̂^T to p̂^S, up to a constant of the row
    if kl.reverse:
        p_student = torch.softmax(student, 1, out=out)
        reverse = torch.mul(log_ratio, p_student, out=student).sum(1, keepdim=True)
        forward = log_ratio.mul_(p_teacher).sum(1, keepdim=True)
    else:
        forward = log_ratio.mul_(p_teacher).sum(1, keepdim=True)
        p_student = torch.softmax(student, 1, out=log_ratio if out is None else out)
    # The largest logit is 0 now, so its p̂ is 1 / Σ exp, which is never 0.
    log_peaks = row_maximum(p_student).log_(), row_maximum(p_teacher).log_()
    offset = log_peaks[1] - log_peaks[0]
    divergence = forward.add_(offset).clamp_min_(0)  # below 0 by rounding only; the gradient does not come this way
    if kl.reverse:
        divergence = kl.forward * divergence + kl.reverse * reverse.add_(offset).neg_().clamp_min_(0)
    return Comparison(torch.stack([divergence, *largest, *log_peaks]).squeeze(2), p_student, p_teacher)


def block_gradient(
    sides: Sides,
    g: int,
    p_student: Tensor,
    p_teacher: Tensor | None,
    kl: KLWeights,
    slope: Tensor,
    grad: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """(N, K) gradient of block g with respect to u = z/T.

    Args:
        p_student, p_teacher: (N, K) softmaxes; the teacher's is computed where it is None.
        slope: (N, 1) gradient that comes down on the log mass of the block.
        grad: (N, 1) gradient that comes down on its divergence, or None.
        out: where to write it.
    """
    if grad is None:
        return torch.mul(p_student, slope, out=out)
    if p_teacher is None:
        p_teacher = torch.softmax(sides.block(g, 1), 1, out=out)
    gradient = torch.sub(p_student, p_teacher, out=out).mul_(kl.forward * grad)  # exactly 0 for equal sides
    if kl.reverse:
        log_ratio = log_quotient(sides.block(g, 0).log_softmax(1), sides.block(g, 1).log_softmax(1), sides.void(g))
        log_ratio.sub_((p_student * log_ratio).sum(1, keepdim=True))
        gradient.addcmul_(log_ratio.mul_(p_student), kl.reverse * grad)
    return gradient.addcmul_(p_student, slope)


def log_quotient(log_a: Tensor, log_b: Tensor, void: Tensor | None) -> Tensor:
    """log_a − log_b in the memory of a; 0 at `void`, where both are −inf and their difference is no number."""
    log_ratio = log_a.sub_(log_b)
    if void is None:
        return log_ratio
    return log_ratio.masked_fill_(void, 0.0) if void.dtype == torch.bool else put(log_ratio, void, 0.0)


def put(values: Tensor, index: Tensor, value: float) -> Tensor:
    """`values.scatter_(1, index, value)`, which on a CPU is four times slower with a number than with a tensor."""
    return values.scatter_(1, index, values.new_full(index.shape, value))


def row_maximum(values: Tensor) -> Tensor:
    """`values.amax(1, keepdim=True)`, which on a CPU takes most of its time for the ragged end of a short row.

    Two windows that overlap have no such end: at 81 classes they take half the time.
    """
    classes = values.shape[1]
    width = classes // 32 * 32
    if width in (0, classes) or classes > 256 or values.device.type != "cpu":
        return values.amax(1, keepdim=True)
    return torch.maximum(values[:, :width].amax(1, keepdim=True), values[:, -width:].amax(1, keepdim=True))
