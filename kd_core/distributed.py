"""Averages the streams' gradients over the ranks: flat buckets of a fixed size, a set at a time, while the next set's backward runs."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # DistributedDataParallel's own default


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def make_buckets(params: Iterable[Tensor], bucket_bytes: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Parameters in order, cut into buckets of one device and dtype and at most `bucket_bytes` (a larger parameter is alone)."""
    buckets: list[list[Tensor]] = []
    kind, room = None, 0
    for p in params:
        size = p.numel() * p.element_size()
        if kind != (p.device, p.dtype) or size > room:
            buckets.append([])
            kind, room = (p.device, p.dtype), bucket_bytes
        buckets[-1].append(p)
        room -= size
    return buckets


def flat_views(bucket: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor, and for each parameter a tensor of its shape and layout inside it."""
    flat = bucket[0].new_empty(sum(p.numel() for p in bucket), requires_grad=False)
    views, offset = [], 0
    for p in bucket:
        stride = torch.empty_like(p, device="meta").stride()  # dense, in the parameter's memory format
        # Not a slice of `flat`: views share one version counter, and each gradient needs its own.
        views.append(flat.new_empty(0).set_(flat.untyped_storage(), offset, p.shape, stride))
        offset += p.numel()
    return flat, views


class SetReduction:
    """The mean over the ranks of every set's gradients, which every rank takes over the same parameters in the same order.

    A gradient that a rank lacks is 0 there, and a bitmap, reduced last, tells which parameters a set reached on any rank. The
    buckets become the gradients' own memory, so what is needed beyond them is one bucket. Sent per rank: (sets) × parameters.

    The bitmap decides on the host which parameters move. With NCCL alone it has to come back from the GPU, once a step;
    under `init_process_group("cpu:gloo,cuda:nccl")` it never goes there.
    """

    def __init__(self, params: Sequence[Tensor], sets: int, bucket_bytes: int = BUCKET_BYTES) -> None:
        self.params = list(params)
        self.buckets = make_buckets(self.params, bucket_bytes)
        self.reached = torch.zeros(sets, len(self.params), dtype=torch.uint8)
        self.flats: list[Tensor] = []
        self.works: list[dist.Work] = []

    def start(self, index: int, gradient: dict[Tensor, Tensor]) -> None:
        """Puts set `index` on its way; `gradient` is complete, and final only after `finish`."""
        self.reached[index] = torch.tensor([p in gradient for p in self.params], dtype=torch.uint8)
        for bucket in self.buckets:
            flat, views = flat_views(bucket)
            here = [i for i, p in enumerate(bucket) if p in gradient]
            if len(here) < len(bucket):
                flat.zero_()
            if here:
                torch._foreach_copy_([views[i] for i in here], [gradient[bucket[i]] for i in here])
            flat.div_(world_size())
            gradient.update(zip(bucket, views, strict=True))
            self.flats.append(flat)
            self.works.append(dist.all_reduce(flat, async_op=True))

    def finish(self, of_set: Sequence[dict[Tensor, Tensor]]) -> None:
        """Waits for all sets, and takes out the parameters that a set reached on no rank."""
        reached = self.reached.to(_bitmap_device(self.params))
        dist.all_reduce(reached, op=dist.ReduceOp.MAX)
        for work in self.works:
            work.wait()
        for gradient, row in zip(of_set, reached.tolist(), strict=True):
            for p, is_reached in zip(self.params, row, strict=True):
                if not is_reached:
                    del gradient[p]


def _bitmap_device(params: Sequence[Tensor]) -> torch.device:
    backends = dist.get_backend_config(dist.group.WORLD)
    return torch.device("cpu") if "cpu:" in backends else params[0].device
