"""One process among several: start under torchrun or alone, seeds, and errors as one sentence."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import nn

from kd_cls.data.reproducible import mix_seed
from kd_core.utils.errors import UserError


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

    A process group that exists already is used as it is, and left.

    Raises:
        UserError: the device is not to be had.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"DEVICE is {device!r}, but torch finds no CUDA device: use DEVICE cpu or auto")
    if dist.is_initialized():
        yield Process(torch.device(kind), dist.get_rank(), dist.get_world_size())
        return
    # With gloo for CPU tensors beside NCCL, small facts are exchanged without waiting for the GPU.
    backend = "cpu:gloo,cuda:nccl" if kind.startswith("cuda") else "gloo"
    started = init_distributed_device_so(kind, dist_backend=backend)
    try:
        yield Process(torch.device(started["device"]), started["global_rank"], started["world_size"])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def agree(value: Any) -> Any:
    """Rank 0's `value`, on every process: what depends on files or chance must be decided once."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def same_weights(module: nn.Module) -> None:
    """Give every process rank 0's weights and buffers."""
    if dist.is_initialized():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def seed_step(seed: int, rank: int, iteration: int) -> None:
    """Set python's, numpy's and torch's generators from (seed, rank, iteration): --resume has nothing to restore."""
    random_seed(mix_seed(seed, rank, iteration) % 2**32)


def option_parser(description: str) -> argparse.ArgumentParser:
    """`--config-file FILE [KEY VALUE …]`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, help="a yaml file of kd_cls")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser


def run_command(main: Callable[[], object]) -> None:
    """Run a command; bad input, and a file that cannot be had, end it with one sentence in place of a traceback."""
    program = Path(sys.argv[0]).name
    try:
        main()
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"{program}: {error}")
    except OSError as error:
        if error.filename is None:  # none of the user's files
            raise
        sys.exit(f"{program}: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: interrupted; training goes on from OUTPUT_DIR/last.pth with --resume")
