"""The mean of the streams' gradients over the ranks, in flat buckets of a fixed size, set after set."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel


def world_size(group: "dist.ProcessGroup | None" = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def is_sharded(t: Tensor) -> bool:
    """Whether a tensor is a DTensor, as the parameters and gradients of `torch.distributed.fsdp.fully_shard` are."""
    return hasattr(t, "to_local")  # not by isinstance: importing DTensor takes longer than the rest of kd_core


def local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return t.to_local() if is_sharded(t) else t


def refuse_fsdp1(params: Iterable[Tensor]) -> None:
    """Raises ValueError for parameters of `FullyShardedDataParallel`: each rank holds others, under the same names."""
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "the optimizer holds parameters of FullyShardedDataParallel (FSDP1), whose gradients cannot be told apart "
            "by stream: shard the model by torch.distributed.fsdp.fully_shard (FSDP2) instead"
        )


def gradient_dtype(p: Tensor) -> torch.dtype:
    """The type of `p.grad`: that of the parameter, unless `p.grad_dtype` says otherwise."""
    return getattr(p, "grad_dtype", None) or p.dtype


class SetReduction:
    """The mean over the ranks of every set's gradients, in the same order of sets, parameters and buckets everywhere.

    A rank that lacks a gradient sends zeros, and a bitmap, reduced last, tells which parameters a set reached on any
    rank. `start` returns at once, so a set travels while the next one's backward pass runs. The buckets become the
    gradients' own memory, so no more than one bucket is needed beyond them. A rank sends (number of sets) × (size of
    the parameters): `bytes_sent`.

    The host needs the bitmap, to leave alone what no rank has reached. Under NCCL alone that is a wait for the GPU,
    once a step; under `init_process_group("cpu:gloo,cuda:nccl")` it does not touch the GPU.
    """

    def __init__(self, params: Sequence[Tensor], sets: int, group: "dist.ProcessGroup | None" = None) -> None:
        self.params, self.group = list(params), group
        self.buckets = make_buckets(self.params, BUCKET_BYTES)
        self.reached = torch.zeros(sets, len(self.params), dtype=torch.uint8)
        self.bytes_sent = 0
        self._sent: list[tuple[Tensor, dist.Work]] = []

    def start(self, index: int, gradient: dict[Tensor, Tensor]) -> None:
        """Sends set `index`. `gradient` then holds every parameter, with values that are final after `finish`."""
        self.reached[index] = torch.tensor([p in gradient for p in self.params], dtype=torch.uint8)
        for bucket in self.buckets:
            flat, views = flat_bucket(bucket)
            here = [i for i, p in enumerate(bucket) if p in gradient]
            if len(here) < len(bucket):
                flat.zero_()
            if here:
                torch._foreach_copy_([views[i] for i in here], [gradient[bucket[i]] for i in here])
            flat.div_(world_size(self.group))
            gradient.update(zip(bucket, views, strict=True))
            self._sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))
            self.bytes_sent += flat.nbytes

    def finish(self, of_set: Sequence[dict[Tensor, Tensor]]) -> None:
        """Waits for all sets, and removes from each the parameters that it reached on no rank."""
        on_host = "cpu:" in dist.get_backend_config(self.group)
        reached = self.reached if on_host or not self.params else self.reached.to(self.params[0].device)
        dist.all_reduce(reached, op=dist.ReduceOp.MAX, group=self.group)
        for _, work in self._sent:
            work.wait()
        for gradient, row in zip(of_set, reached.tolist(), strict=True):
            for p, is_reached in zip(self.params, row, strict=True):
                if not is_reached:
                    del gradient[p]


def make_buckets(params: Iterable[Tensor], bucket_bytes: int) -> list[list[Tensor]]:
    """Parameters, in order, in buckets of one device and dtype and at most `bucket_bytes` (or one larger parameter)."""
    buckets: list[list[Tensor]] = []
    kind, room = None, 0
    for p in params:
        dtype = gradient_dtype(p)
        nbytes = p.numel() * dtype.itemsize
        if kind != (p.device, dtype) or nbytes > room:
            buckets.append([])
            kind, room = (p.device, dtype), bucket_bytes
        buckets[-1].append(p)
        room -= nbytes
    return buckets


def flat_bucket(bucket: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One flat tensor, and inside it a tensor of each parameter's shape and memory format."""
    flat = torch.empty(sum(p.numel() for p in bucket), dtype=gradient_dtype(bucket[0]), device=bucket[0].device)
    views, offset = [], 0
    for p in bucket:
        stride = p.stride() if p.is_contiguous() else torch.empty_like(p, device="meta").stride()
        views.append(flat.as_strided(p.shape, stride, offset))
        offset += p.numel()
    return flat, views
