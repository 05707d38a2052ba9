"""Several losses, several gradients: streams, the sets of streams that share a momentum, and their backward passes.

A *stream* is a name for loss terms whose gradients share a momentum (DeepKD: `tog`, `tcg`, `ncg`). Streams of equal
momentum obey the same linear recursion, so their losses are summed before the backward pass: a *set* of them costs one
pass and one buffer.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.distributed import SetReduction, is_sharded, refuse_fsdp1, world_size
from kd_core.streams.gradients import StreamGradients, StreamSets

# .9 + .05 and .95 differ by one bit; momenta that are meant to differ do so by far more than this.
MOMENTUM_TOLERANCE = 1e-9

TASK_STREAM = "tog"


def stream_sets(momenta: Sequence[Mapping[str, float]]) -> StreamSets:
    """The finest partition of the streams that holds in every parameter group.

    Two streams are in one set where their momenta agree, to `MOMENTUM_TOLERANCE`, in every group.

    Args:
        momenta: one {stream: momentum} per parameter group, all of the same streams.
    Returns:
        The sets, ordered as their first streams are in the first group.
    """
    sets: list[list[str]] = []
    for stream in momenta[0]:
        for members in sets:
            if all(abs(of_group[stream] - of_group[members[0]]) <= MOMENTUM_TOLERANCE for of_group in momenta):
                members.append(stream)
                break
        else:
            sets.append([stream])
    return tuple(tuple(members) for members in sets)


def to_streams(terms: Mapping[str, Tensor], loss: Any, task_loss: Tensor | None = None) -> dict[str, Tensor]:
    """The terms of a loss, summed by stream: what `backward_streams` takes.

    Args:
        terms: {term: value}, as the loss returned them.
        loss: the loss, or anything whose `streams` is {term: stream}.
        task_loss: added to stream "tog".
    Raises:
        ValueError: a term that `loss.streams` does not name.
    """
    sums = {} if task_loss is None else {TASK_STREAM: task_loss}
    for term, value in terms.items():
        if term not in loss.streams:
            raise ValueError(f"unknown term {term!r}: {type(loss).__name__}.streams names {', '.join(loss.streams)}")
        stream = loss.streams[term]
        sums[stream] = sums[stream] + value if stream in sums else value
    return sums


def backward_streams(
    losses: Mapping[str, Tensor | None],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    sync: bool = True,
    retain_graph: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Runs one backward pass per set of streams; afterwards `p.grad` shows the sum of all streams.

    Called again before `optimizer.step()`, gradients add up (micro-batches). A stream that is absent, None or without a
    graph reaches no parameter. Under `torch.distributed` each set's gradients are averaged over the ranks: make the
    forward pass in `no_sync()` (or on the plain module), and call this on every rank, whatever streams its batch has.
    Parameters of `torch.distributed.fsdp.fully_shard` are averaged by FSDP itself, in every pass, so for them `sync`
    changes nothing.

    Args:
        losses: {stream: scalar loss}.
        optimizer: a stream optimizer; any other `torch.optim` optimizer takes all streams as one set. The wrappers of
            accelerate and Lightning are unwrapped.
        scaler: scales every stream; the step is then `scaler.step(optimizer)`.
        sync: average over the ranks now. False for all micro-batches but the last.
        retain_graph: keep the graph after the last set's pass, too.
        process_group: the ranks to average over; None: all.
    Warns:
        RuntimeWarning: after the last micro-batch (`sync`) no parameter has a gradient, so a step would do nothing.
    Raises:
        ValueError: an unknown stream; a loss that is not a scalar tensor; parameters of `FullyShardedDataParallel`.
        RuntimeError: `p.grad` was changed, or filled by another `backward()`, since the last call.
    """
    optimizer = unwrap_optimizer(optimizer)
    sets = getattr(optimizer, "stream_sets", None) or (tuple(losses),)
    set_losses = _set_losses(losses, sets)
    gradients = getattr(optimizer, "gradients", None) or StreamGradients()
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    refuse_fsdp1(params)
    gradients.open(params, sets, scaler if scaler is not None and scaler.is_enabled() else None)
    replicated = [p for p in params if not is_sharded(p)]
    averages = sync and replicated and world_size(process_group) > 1
    reduction = SetReduction(replicated, len(sets), process_group) if averages else None
    last = max((i for i, loss in enumerate(set_losses) if loss is not None), default=-1)
    try:
        for i, loss in enumerate(set_losses):
            if loss is not None:
                gradients.backward(params, i, loss, retain_graph or i < last)
            if reduction is not None:
                reduction.start(i, gradients.of_set[i])
        if reduction is not None:
            reduction.finish(gradients.of_set)
            gradients.bytes_sent += reduction.bytes_sent
    except BaseException:
        gradients.clear()  # incomplete: no step may use them
        for p in params:
            p.grad = None
        raise
    gradients.show(params)
    if sync and all(p.grad is None for p in params):
        warnings.warn(
            "backward_streams: no loss reaches a parameter of the optimizer, so a step will change nothing: check "
            "requires_grad of the parameters, and no_grad() or detach() on the way to the losses",
            RuntimeWarning,
            stacklevel=2,
        )


def unwrap_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's `AcceleratedOptimizer` or Lightning's `LightningOptimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def _set_losses(losses: Mapping[str, Tensor | None], sets: StreamSets) -> list[Tensor | None]:
    """The summed loss of each set; None where nothing of it requires a gradient."""
    known = [stream for streams in sets for stream in streams]
    for stream, loss in losses.items():
        if stream not in known:
            raise ValueError(f"unknown stream {stream!r}: the optimizer's momenta name {', '.join(known)}")
        if loss is not None and not isinstance(loss, Tensor):
            raise ValueError(f"the loss of stream {stream!r} is {loss!r}: give a scalar tensor, or None for no loss")
        if loss is not None and loss.numel() != 1:
            raise ValueError(f"the loss of stream {stream!r} has shape {tuple(loss.shape)}: give its mean or its sum")
    summed: list[Tensor | None] = []
    for streams in sets:
        terms = [losses[s].reshape(()) for s in streams if losses.get(s) is not None and losses[s].requires_grad]
        summed.append(sum(terms[1:], terms[0]) if terms else None)
    return summed
