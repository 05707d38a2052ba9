"""The gradients of every set of streams between backward pass and step, and `p.grad`, which shows their sum."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.distributed import BUCKET_BYTES, is_sharded, local, make_buckets

StreamSets = tuple[tuple[str, ...], ...]


class Shown(NamedTuple):
    """What `p.grad` was set to, and its version counter then."""

    grad: Tensor
    version: int


class StreamGradients:
    """One optimizer's gradients between backward and step: for each set of streams {parameter: gradient}.

    With one set `p.grad` itself is the gradient, as with any optimizer. With more, `p.grad` shows their sum, and
    `check` notices every change of it. A change by one common factor (`torch.nn.utils.clip_grad_norm_`,
    `GradScaler.unscale_`) is applied to every stream; any other would be lost, and is an error.

    The check costs nothing in the usual case: the memory of `p.grad` is marked copy-on-write, and any request to write
    to it, also through an alias (`p.grad.data`, numpy), removes the mark. Only then is its content compared with the
    sum of the streams, which takes about as long as two steps of the optimizer.
    """

    def __init__(self) -> None:
        self.bytes_sent = 0  # by this rank, over the optimizer's life
        self.clear()

    def clear(self) -> None:
        self.sets: StreamSets = ()
        self.of_set: list[dict[Tensor, Tensor]] = []
        self.shown: dict[Tensor, Shown] = {}
        self.scaler: torch.amp.GradScaler | None = None
        self.scale: Tensor | None = None  # by which the streams must still be divided
        self.was_scaled = False  # by a scaler, until the gradients are dropped
        self.is_zeroed = False  # by `zero_grad(set_to_none=False)`, and nothing added since

    def open(self, params: Sequence[Tensor], sets: StreamSets, scaler: torch.amp.GradScaler | None) -> None:
        """Prepares for another backward pass, whose gradients are added to those so far."""
        if len(sets) == 1:
            of_set = [{p: p.grad for p in params if p.grad is not None}]
        else:
            self.check(params, sets)
            of_set = self.of_set or [{} for _ in sets]
        is_mixed = bool(self.sets) and not self.is_zeroed and (scaler is None) != (self.scale is None)
        if not any(of_set):
            self.clear()
        elif is_mixed and any_nonzero(local(g) for gradient in of_set for g in gradient.values()):
            raise RuntimeError("micro-batches of one step are all scaled or none; clip and unscale after the last")
        self.sets, self.of_set, self.scaler, self.is_zeroed = sets, of_set, scaler, False
        if scaler is not None and params:  # also on a rank without a loss: the other ranks' gradients are scaled
            self.scale, self.was_scaled = scaler.scale(torch.ones((), device=params[0].device)), True
        self.shown = {}  # the sum's memory is free during the next backward pass

    def backward(self, params: Sequence[Tensor], index: int, loss: Tensor, retain_graph: bool) -> None:
        """One backward pass, added to the gradients of set `index`."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        gradient = self.of_set[index]
        for p in params:
            p.grad = gradient.get(p)
        loss.backward(retain_graph=retain_graph)
        sharded = [p for p in params if is_sharded(p)]
        if len(self.of_set) > 1 and sharded and all(p.grad is None for p in sharded):
            raise RuntimeError(
                "a backward pass left no gradient in any parameter sharded by fully_shard. Several streams need their "
                "gradients reduced in every pass: do not call set_requires_gradient_sync(False)"
            )
        for p in params:
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise RuntimeError("sparse gradients have no streams: build nn.Embedding with sparse=False")
                gradient[p] = p.grad
                p.grad = None  # the reduction moves it into a bucket, so nothing else may keep it alive

    @torch.no_grad()
    def show(self, params: Iterable[Tensor]) -> None:
        """Makes `p.grad` the gradient of the only set, or the sum over several."""
        self.shown = {}
        parts = {p: [gradient[p] for gradient in self.of_set if p in gradient] for p in params}
        for p in params:
            p.grad = None
        if len(self.of_set) == 1:
            for p in self.of_set[0]:
                p.grad = self.of_set[0][p]
            return
        for p, total in sums({p: [local(g) for g in of_p] for p, of_p in parts.items() if of_p}).items():
            like = parts[p][0]
            if is_sharded(like):
                mesh, placements = like.device_mesh, like.placements
                total = type(like).from_local(total, mesh, placements, shape=like.shape, stride=like.stride())
            p.grad = total
            self._watch(p)

    def _watch(self, p: Tensor) -> None:
        mark_unwritten(local(p.grad))
        self.shown[p] = Shown(p.grad, local(p.grad)._version)

    @torch.no_grad()
    def check(self, params: Sequence[Tensor], sets: StreamSets, unscaled_by: Tensor | None = None) -> None:
        """Raises if `p.grad` was changed, except by one common factor, which is then applied to every stream.

        If every `p.grad` is None, as after `model.zero_grad()`, the streams are cleared. Zeros where nothing was shown
        are a gradient of 0 in every stream: `torch.distributed.checkpoint` steps them to build the optimizer's state.

        Args:
            unscaled_by: the factor by which a GradScaler has multiplied `p.grad`.
        """
        if self.shown and all(p.grad is None for p in params):
            self.clear()
        if self.shown and sets != self.sets:
            raise RuntimeError("momenta changed between backward_streams and step: set them before, or after zero_grad")
        if not self.shown:
            self._take_zeros(params, sets)
        if any(p.grad is not (self.shown[p].grad if p in self.shown else None) for p in params):
            raise RuntimeError(CHANGED)
        has_moved = any(local(shown.grad)._version != shown.version for shown in self.shown.values())
        if has_moved or unscaled_by is not None or any(is_written(local(s.grad)) for s in self.shown.values()):
            self._follow(unscaled_by, has_moved)

    def _take_zeros(self, params: Iterable[Tensor], sets: StreamSets) -> None:
        given = [p for p in params if p.grad is not None]
        if any(local(p.grad).any() for p in given):
            raise RuntimeError(CHANGED)
        self.sets, self.of_set = sets, [{p: torch.zeros_like(p.grad) for p in given} for _ in sets]
        for p in given:
            self._watch(p)

    def _follow(self, unscaled_by: Tensor | None, has_moved: bool) -> None:
        """Multiplies every stream by the factor between `p.grad` and the streams' sum."""
        if not self.shown:
            return
        over_ranks = any(is_sharded(shown.grad) for shown in self.shown.values())
        if self.scale is not None and not has_moved and all(p.device.type != "cpu" for p in self.shown):
            # Only the scaler has written, or code through `.data`: the factor is known, and the host need not wait.
            factor = unscaled_by if unscaled_by is not None else torch.ones_like(self.scale)
            torch._assert_async(~differs(self._grads_and_sums(), factor), CHANGED)
        else:
            factor = common_factor(self._grads_and_sums(), over_ranks)
            wrong = differs(self._grads_and_sums(), factor)
            if over_ranks:
                wrong = wrong.to(torch.uint8)
                dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
            if wrong:
                if any_nonzero((local(shown.grad) for shown in self.shown.values()), over_ranks):
                    raise RuntimeError(CHANGED)
                self.zero_(list(self.shown))  # zeroed in place, and a stream is infinite: no factor makes that 0
                return
        if factor.device.type != "cpu" or factor != 1:
            foreach_multiply_(self.stream_tensors(), factor)
            for p, total in sums(self._parts()).items():
                local(self.shown[p].grad).copy_(total)  # the user's tensor stays; the sum is rounded as it is shown
        for p in list(self.shown):
            self._watch(p)

    def _parts(self) -> dict[Tensor, list[Tensor]]:
        """{parameter: its gradients in the sets that reach it}; of sharded ones, this rank's part."""
        return {p: [local(gradient[p]) for gradient in self.of_set if p in gradient] for p in self.shown}

    def _grads_and_sums(self) -> Iterator[tuple[Tensor, Tensor]]:
        """`p.grad` beside the sum of the streams, in flat pieces of one device, dtype and limited size."""
        parts = {local(self.shown[p].grad): of_p for p, of_p in self._parts().items()}
        for bucket in make_buckets(parts, BUCKET_BYTES):
            totals = sums({grad: parts[grad] for grad in bucket})
            yield torch.cat([g.reshape(-1) for g in bucket]), torch.cat([totals[g].reshape(-1) for g in bucket])

    def multiply_(self, factors: Tensor | Mapping[Tensor, Tensor]) -> None:
        """Multiplies every stream, and what is shown, by one factor, or by one per parameter."""
        params = list(self.shown)
        if isinstance(factors, Tensor):
            foreach_multiply_(self.stream_tensors(), factors)
        else:
            pairs = [(local(of_set[p]), factors[p]) for of_set in self.of_set for p in of_set if p in factors]
            if pairs:
                torch._foreach_mul_(*(list(column) for column in zip(*pairs, strict=True)))
        self.show(params)

    def zero_(self, params: Iterable[Tensor]) -> None:
        """Makes every gradient 0, and keeps which parameters each set has reached."""
        self.shown = {}
        if tensors := self.stream_tensors():
            torch._foreach_zero_(tensors)
        self.scaler, self.scale, self.is_zeroed = None, None, True
        self.show(params)

    def stream_tensors(self) -> list[Tensor]:
        """The gradients of every set; of a sharded one, this rank's part."""
        return [local(g) for gradient in self.of_set for g in gradient.values()]

    def tensors(self) -> list[Tensor]:
        """The memory that gradients take: those of every set, and the sums that are shown, each once."""
        every = [*self.stream_tensors(), *(local(shown.grad) for shown in self.shown.values())]
        return list({id(t): t for t in every}.values())


# At most 254 characters: torch._assert_async refuses more on a GPU.
CHANGED = (
    "p.grad was changed outside backward_streams, where it only shows the sum of several streams: use backward_streams "
    "for loss.backward, optimizer.zero_grad and optimizer.clip_grad_norm_ to clip (clipping by value reaches no stream)"
)


def any_nonzero(tensors: Iterable[Tensor], over_ranks: bool = False) -> bool:
    """Whether any element, of any rank, is not 0."""
    found = [t.any() for t in tensors]
    found = torch.stack([flag.to(found[0].device) for flag in found]).any().to(torch.uint8)
    if over_ranks:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found)


def sums(parts: Mapping[Tensor, Sequence[Tensor]]) -> dict[Tensor, Tensor]:
    """The sum of each list, in memory of its own."""
    several = [p for p, of_p in parts.items() if len(of_p) > 1]
    totals = {p: of_p[0].clone() for p, of_p in parts.items() if len(of_p) == 1}
    if several:
        firsts, seconds = [parts[p][0] for p in several], [parts[p][1] for p in several]
        totals.update(zip(several, torch._foreach_add(firsts, seconds), strict=True))
    for i in range(2, max(map(len, parts.values()), default=0)):
        more = [p for p in several if len(parts[p]) > i]
        torch._foreach_add_([totals[p] for p in more], [parts[p][i] for p in more])
    return totals


def mark_unwritten(t: Tensor) -> None:
    """Marks a tensor's memory; a request to write removes the mark (some kernels request it and only read)."""
    if CAN_MARK:
        t._lazy_clone()  # the clone is freed at once, so a write copies nothing; the mark stays


def is_written(t: Tensor) -> bool:
    """Whether the tensor may have been written to since `mark_unwritten`."""
    if type(t) is not Tensor or not t.numel():
        return False  # a FakeTensor has no memory: only its version counter shows a write
    return not (CAN_MARK and torch._C._is_cow_tensor(t))


CAN_MARK = hasattr(torch, "_lazy_clone") and hasattr(torch._C, "_is_cow_tensor")


def common_factor(grads_and_sums: Iterable[tuple[Tensor, Tensor]], over_ranks: bool) -> Tensor:
    """The c for which c · sums is nearest to grads, by least squares over the finite elements; 1 where all are 0.

    Args:
        over_ranks: each rank holds its own part, and all find the same c.
    """
    products = None
    for grad, total in grads_and_sums:
        finite = total.isfinite()
        grad, total = (torch.where(finite, t, 0).to(wide_dtype(grad)) for t in (grad, total))
        pair = torch.stack([grad.dot(total), total.dot(total)])
        products = pair if products is None else products + pair.to(products.device)
    if over_ranks:
        dist.all_reduce(products)
    return torch.where(products[1] == 0, 1.0, products[0] / products[1])


def differs(grads_and_sums: Iterable[tuple[Tensor, Tensor]], factor: Tensor) -> Tensor:
    """Whether any element of the gradients is not factor · sum, up to rounding to its own type."""
    wrong = torch.zeros((), dtype=torch.bool, device=factor.device)
    for grad, total in grads_and_sums:
        limits, wide = torch.finfo(grad.dtype), wide_dtype(grad)
        expected = total.to(wide) * factor.to(total.device)
        # Each of a few factors in a row rounds by half an eps, and where one element is much larger than the others the
        # common factor is as far off. Below the normal numbers the spacing is absolute.
        close = torch.isclose(
            grad.to(wide),
            expected,
            rtol=max(4 * limits.eps, 1e-14),
            atol=max(limits.tiny * limits.eps, 1.2e-38),
            equal_nan=True,
        )
        wrong |= (~close).any().to(wrong.device)
    return wrong


def wide_dtype(t: Tensor) -> torch.dtype:
    """A type in which products of the tensor's elements are exact, or nearly."""
    return torch.float32 if t.device.type == "mps" else torch.float64


def foreach_multiply_(tensors: Iterable[Tensor], factor: Tensor) -> None:
    """`t *= factor` for tensors on any devices; the factor is a scalar tensor, never read by the host."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for t in tensors:
        kinds.setdefault((t.device, t.dtype), []).append(t)
    for (device, dtype), alike in kinds.items():
        torch._foreach_mul_(alike, factor.to(device, torch.promote_types(dtype, torch.float32)))
