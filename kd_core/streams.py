"""Several losses, several gradients: streams, the sets of streams that share a momentum, and their backward passes.

A *stream* is a name for loss terms whose gradients share a momentum (DeepKD: `tog`, `tcg`, `ncg`). Streams of equal
momentum obey the same linear recursion, so their losses are summed before the backward pass: a *set* of them costs one
pass and one buffer.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from kd_core.distributed import SetReduction, world_size
from kd_core.spare import SpareTensors

# .9 + .05 and .95 differ by one bit; momenta that are meant to differ do so by far more than this.
MOMENTUM_TOLERANCE = 1e-9

StreamSets = tuple[tuple[str, ...], ...]


def stream_sets(momenta: Sequence[Mapping[str, float]]) -> StreamSets:
    """The finest partition of the streams that holds in every parameter group.

    Two streams are in one set where their momenta agree, to `MOMENTUM_TOLERANCE`, in every group.

    Args:
        momenta: one {stream: momentum} a parameter group, all of the same streams.
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


def backward_streams(
    losses: Mapping[str, Tensor | None],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    sync: bool = True,
    retain_graph: bool = False,
) -> None:
    """The streams' backward passes, one a set, into `optimizer`; afterwards `p.grad` shows the sum of all streams.

    Called again before `optimizer.step()`, gradients add up (micro-batches). A stream that is absent, None or without a
    graph reaches no parameter. Under `torch.distributed` each set's gradients are averaged over the ranks: make the
    forward pass in `no_sync()` (or on the plain module), and call this on every rank, whatever streams its batch has.

    Args:
        losses: {stream: scalar loss}.
        optimizer: a stream optimizer; any other `torch.optim` optimizer takes all streams as one set.
        scaler: scales every stream; the step is then `scaler.step(optimizer)`.
        sync: average over the ranks now. False for all micro-batches but the last.
        retain_graph: keep the graph after the last set's pass, too.
    Raises:
        ValueError: an unknown stream; a loss that is no scalar tensor.
        RuntimeError: `p.grad` was changed, or filled by another `backward()`, since the last call.
    """
    sets = getattr(optimizer, "stream_sets", None) or (tuple(losses),)
    set_losses = _set_losses(losses, sets)
    gradients = getattr(optimizer, "gradients", None) or StreamGradients()
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    gradients.open(params, sets, scaler if scaler is not None and scaler.is_enabled() else None)
    reduction = SetReduction(params, len(sets)) if sync and world_size() > 1 else None
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
        gradients.clear()  # half of a step's gradients is worth nothing
        for p in params:
            p.grad = None
        raise
    gradients.show(params)


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


class StreamGradients:
    """One optimizer's gradients between backward and step: for each set of streams {parameter: gradient}.

    With one set `p.grad` itself is the gradient, as with any optimizer. With more, `p.grad` shows their sum, and its
    version counter tells, without a synchronisation, whether anybody has changed it since: a change would be lost.
    """

    def __init__(self) -> None:
        self.spare = SpareTensors()
        self.bytes_sent = 0  # by this rank, over the optimizer's life
        self.clear()

    def clear(self) -> None:
        self.sets: StreamSets = ()
        self.of_set: list[dict[Tensor, Tensor]] = []
        self.shown: dict[Tensor, tuple[Tensor, int]] = {}  # the sum, and its version when it was shown
        self.scaler: torch.amp.GradScaler | None = None
        self.scale: Tensor | None = None  # what the streams have yet to be divided by

    def open(self, params: Sequence[Tensor], sets: StreamSets, scaler: torch.amp.GradScaler | None) -> None:
        """Makes ready to add another backward pass to what is there."""
        if len(sets) == 1:
            of_set = [{p: p.grad for p in params if p.grad is not None}]
        else:
            self.check(params, sets)
            of_set = self.of_set or [{} for _ in sets]
        if not any(of_set):
            self.clear()
        elif self.sets and (scaler is None) != (self.scale is None):
            raise RuntimeError("micro-batches of one step are all scaled or none; clip and unscale after the last")
        self.sets, self.of_set, self.scaler = sets, of_set, scaler

    def backward(self, params: Iterable[Tensor], index: int, loss: Tensor, retain_graph: bool) -> None:
        """One backward pass, added to the gradients of set `index`."""
        if self.scaler is not None:
            self.scale = self.scaler.scale(torch.ones((), device=loss.device))
            loss = loss * self.scale
        gradient = self.of_set[index]
        for p in params:
            p.grad = gradient.get(p)
        loss.backward(retain_graph=retain_graph)
        for p in params:
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise RuntimeError("sparse gradients have no streams: build nn.Embedding with sparse=False")
                gradient[p] = p.grad
                p.grad = None  # the reduction moves it into a bucket: nobody else may keep it alive

    def show(self, params: Iterable[Tensor]) -> None:
        """Makes `p.grad` the sum over the sets; where one set alone reaches a parameter, they are the same tensor."""
        self.shown = {}
        parts = {p: [gradient[p] for gradient in self.of_set if p in gradient] for p in params}
        for p in params:
            p.grad = None
        sums = self._sums({p: of_p for p, of_p in parts.items() if len(of_p) > 1})
        for p, of_p in parts.items():
            if len(of_p) == 1:
                # scaler.unscale_ divides p.grad, and shall not divide the stream's own gradient with it.
                sums[p] = of_p[0].clone() if self.scaler is not None and len(self.of_set) > 1 else of_p[0]
            p.grad = sums.get(p)
        self.shown = {p: (total, total._version) for p, total in sums.items()}

    def _sums(self, parts: Mapping[Tensor, list[Tensor]]) -> dict[Tensor, Tensor]:
        """The sum of each list of two or more."""
        sums: dict[Tensor, Tensor] = {}
        for p in (p for p in parts if p.device.type == "cpu"):
            sums[p] = torch.add(parts[p][0], parts[p][1], out=self.spare.take(p))
            self.spare.keep(p, sums[p])
        if elsewhere := [p for p in parts if p not in sums]:
            firsts, seconds = [parts[p][0] for p in elsewhere], [parts[p][1] for p in elsewhere]
            sums.update(zip(elsewhere, torch._foreach_add(firsts, seconds), strict=True))
        for i in range(2, len(self.of_set)):
            if more := [p for p in parts if len(parts[p]) > i]:
                torch._foreach_add_([sums[p] for p in more], [parts[p][i] for p in more])
        return sums

    def accept(self) -> None:
        """What `p.grad` holds now is what was meant."""
        self.shown = {p: (total, total._version) for p, (total, _) in self.shown.items()}

    def check(self, params: Iterable[Tensor], sets: StreamSets) -> None:
        """Raises where `p.grad` is not what was shown. All None is `model.zero_grad()`: nothing is left then."""
        if self.shown and all(p.grad is None for p in params):
            self.clear()
        if self.shown and sets != self.sets:
            raise RuntimeError("momenta changed between backward_streams and step: set them before, or after zero_grad")
        for p in params:
            total, version = self.shown.get(p, (None, 0))
            if p.grad is not total or (total is not None and total._version != version):
                raise RuntimeError(
                    "p.grad was changed outside backward_streams, where it only shows the sum of several streams: use "
                    "backward_streams for loss.backward, optimizer.zero_grad, and optimizer.clip_grad_norm_ to clip"
                )

    def tensors(self) -> list[Tensor]:
        """The gradients of every set and the sums that are shown, each once."""
        every = [g for gradient in self.of_set for g in gradient.values()] + [total for total, _ in self.shown.values()]
        return list({id(t): t for t in every}.values())

    def of_parameter(self, p: Tensor) -> list[Tensor]:
        """A parameter's gradient in every set that reaches it, and their sum, each once."""
        every = [gradient[p] for gradient in self.of_set if p in gradient] + [p.grad]
        return list({id(t): t for t in every}.values())


def foreach_multiply_(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """`t *= factor` for tensors on any devices; the factor is a scalar tensor, never read by the host."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        by_device.setdefault(t.device, []).append(t)
    for device, on_device in by_device.items():
        torch._foreach_mul_(on_device, factor.to(device))
