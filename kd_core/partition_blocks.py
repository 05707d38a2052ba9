"""One block of a class partition: the logits of a group on both sides, their comparison, and the gradient of that.

What `kd_core.partition` is made of. Blocks are (N, K), of the student and of the teacher.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# numpy sorts and partitions the rows of these on a CPU several times as fast as torch does.
NUMPY_TYPES = (torch.float32, torch.float64)


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """Student's and teacher's logits z/T of every group and, last, of the rest, which has all C columns.

    All fresh memory. A class that is not in the block is −inf on both sides.
    """
    dtype = work_dtype(student, teacher)
    sides = [to_work_dtype(side, dtype, temperature) for side in (student, teacher)]
    for index, valid in groups:
        student, teacher = (side.gather(1, index) for side in sides)
        if valid is not None:
            student, teacher = (side.masked_fill_(~valid, -torch.inf) for side in (student, teacher))
        yield student, teacher
    if groups:
        listed = torch.cat([group.index for group in groups], 1)
        sides = [scatter_value_(side, listed, -torch.inf) for side in sides]
    student, teacher = sides
    yield student, teacher


def compare(student: Tensor, teacher: Tensor, kl: KLWeights) -> Block:
    """Compare the two sides of a block, which are overwritten: forward KL keeps three such buffers alive, no more.

    Where a probability is 0 because its logit is −inf, p · log(p / q) is 0 · ∞, or NaN where both logits are −inf. The
    limit is 0, which is what `nansum` adds. It hides no wrong logit: that makes the whole row's softmax NaN.
    """
    if student.shape[1] == 1:  # one class has the distribution (1) on both sides
        zeros, ones = torch.zeros_like(student), torch.ones_like(student)
        return Block(ones, ones, None, torch.stack([zeros, student, teacher, zeros, zeros]).squeeze(2))
    largest = student.amax(1, keepdim=True), teacher.amax(1, keepdim=True)
    student.sub_(fill_empty_rows_(student, largest[0]))
    teacher.sub_(fill_empty_rows_(teacher, largest[1]))
    p_teacher = teacher.softmax(1)
    log_ratio = teacher.sub_(student)  # log(p̂^T / p̂^S) up to a constant of the row
    if kl.reverse:
        p_student = student.softmax(1)
    else:
        gap = log_ratio.mul_(p_teacher).nansum(1, keepdim=True)
        p_student = torch.softmax(student, 1, out=log_ratio)
    # The largest logit is 0 now, so its p̂ is 1 / Σ exp, which is never 0.
    log_peaks = p_student.amax(1, keepdim=True).log_(), p_teacher.amax(1, keepdim=True).log_()
    offset = log_peaks[1] - log_peaks[0]
    if kl.reverse:
        log_ratio = zero_excluded_(log_ratio.add_(offset).neg_(), kl)
        divergence, log_ratio = both_divergences(log_ratio, p_student, p_teacher, kl)
    else:
        divergence, log_ratio = gap.add_(offset).clamp_min_(0), None  # below 0 by rounding only
    return Block(p_student, p_teacher, log_ratio, torch.stack([divergence, *largest, *log_peaks]).squeeze(2))


def both_divergences(log_ratio: Tensor, p_student: Tensor, p_teacher: Tensor, kl: KLWeights) -> tuple[Tensor, Tensor]:
    """(N, 1) weighted divergence out of log_ratio = log(p̂^S / p̂^T), and that less the reverse KL, in its memory."""
    forward = (log_ratio * p_teacher).nansum(1, keepdim=True).neg_()
    reverse = (log_ratio * p_student).nansum(1, keepdim=True)
    divergence = kl.forward * forward.clamp_min_(0) + kl.reverse * reverse.clamp_min(0)
    # Where the student's probability is 0 the ratio may be −inf, and the gradient multiplies it by that probability.
    return divergence, log_ratio.sub_(reverse).masked_fill_(p_student == 0, 0.0)


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


def to_work_dtype(logits: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    """A fresh copy of z/T: half precision is widened before it is divided."""
    return logits / temperature if logits.dtype == dtype else logits.to(dtype).div_(temperature)


def scatter_value_(values: Tensor, index: Tensor, value: float) -> Tensor:
    """`values.scatter_(1, index, value)`, which on a CPU is four times slower with a number than with a tensor."""
    return values.scatter_(1, index, values.new_full(index.shape, value))


def zero_excluded_(log_ratio: Tensor, kl: KLWeights) -> Tensor:
    """Set log(p̂^S / p̂^T) to 0 in place where both are 0, and for the reverse KL alone also where the student's is."""
    return log_ratio.nan_to_num_(0.0, torch.inf, -torch.inf if kl.forward else 0.0)


def fill_empty_rows_(logits: Tensor, largest: Tensor) -> Tensor:
    """Give rows whose every logit is −inf all probability in their first class; the (N, 1) maxima to subtract.

    Such a block has no mass, so its distribution is multiplied by 0, which must not meet NaN.
    """
    empty = find_neg_inf(largest)
    if empty is None:
        return largest
    logits[:, :1].masked_fill_(empty, 0.0)
    return largest.masked_fill(empty, 0.0)


def find_neg_inf(rows: Tensor) -> Tensor | None:
    """Where `rows`, one number per row, are −inf; None where that costs no wait for a device to see, and none is."""
    can_look = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    # A minimum of NaN may hide one of −inf.
    return None if can_look and (not rows.numel() or rows.amin().item() > -torch.inf) else rows == -torch.inf


def sort_values(rows: Tensor) -> Tensor:
    """Each row upwards. torch sorts indices along with the values, which takes far longer."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if in_numpy(rows) else rows.sort(1).values


def largest_indices(rows: Tensor, k: int) -> Tensor:
    """(N, k) indices of each row's k largest, in no order.

    numpy partitions a row in a time that k does not change; torch's heap is quicker for a few of many.
    """
    classes = rows.shape[1]
    if in_numpy(rows) and 8 * k > classes > k:
        return torch.from_numpy(np.argpartition(rows.numpy(), classes - k, axis=1)[:, classes - k :])
    return rows.topk(k, 1, sorted=False).indices


def in_numpy(rows: Tensor) -> bool:
    """Whether numpy can read the tensor where it lies."""
    return rows.device.type == "cpu" and rows.dtype in NUMPY_TYPES and not torch.compiler.is_compiling()
