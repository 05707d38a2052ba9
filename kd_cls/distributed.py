"""One process among several: its device and rank, and what rank 0 decides for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import nn

from kd_core.utils.errors import UserError
from kd_core.utils.rng import mix_seed


class Process(NamedTuple):
    """This process: its device, and its place among all."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0


@contextmanager
def start_process(device: str) -> Iterator[Process]:
    """Join the process group that torchrun's environment describes (NCCL on CUDA, gloo on the CPU), or run alone.

    A process group that exists already is used as it is, and not destroyed at the end.

    Raises:
        UserError: the device does not exist here.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.device(kind)
    except RuntimeError as error:
        raise UserError(f"DEVICE is {device!r}, expected auto, cpu or cuda") from error
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"DEVICE is {device!r}, but torch finds no CUDA device: use DEVICE cpu or auto")
    if dist.is_initialized():
        yield Process(torch.device(kind), dist.get_rank(), dist.get_world_size())
        return
    # With gloo for CPU tensors beside NCCL, python objects are exchanged without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
    started = init_distributed_device_so(kind, dist_backend=backend)
    try:
        yield Process(torch.device(started["device"]), started["global_rank"], started["world_size"])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The `value` of rank `source`, on every process: what depends on files or on chance must be decided once."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, source)
    return values[0]


def broadcast_weights(module: nn.Module) -> None:
    """Give every process rank 0's weights and buffers."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Seed python's, numpy's and torch's generators from (seed, rank, iteration), so --resume restores no RNG state."""
    random_seed(mix_seed(seed, rank, iteration) % 2**32)
