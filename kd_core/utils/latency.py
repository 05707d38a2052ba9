"""What a network costs at inference on this machine: parameters, multiply-adds, time."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

RUNS = 5
COST_HEADERS = ["parameters", "GFLOPs", "ms / image"]


@dataclass(frozen=True)
class Cost:
    """What a network costs at inference on this machine."""

    parameters: int
    gflops: float | None  # multiply-adds of one image
    seconds: float  # of one image, median


@torch.no_grad()
def measure_cost(model: nn.Module, image: Any) -> Cost:
    """The cost of `model(image)` in eval mode."""
    model.eval()
    times = []
    for _ in range(RUNS + 1):  # the first one warms up
        start = time.perf_counter()
        model(image)
        wait_for_device(model)
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, multiply_adds(model, image) / 1e9, statistics.median(times[1:]))


def multiply_adds(model: nn.Module, image: Any) -> int:
    """Of a forward pass, counted as fvcore and the papers do."""
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() // 2  # a multiply-add counts as two operations there


def cost_cells(cost: Cost) -> list[str]:
    """A cost under `COST_HEADERS`."""
    gflops = "–" if cost.gflops is None else f"{cost.gflops:.3g}"
    return [f"{cost.parameters / 1e6:.2f} M", gflops, f"{1000 * cost.seconds:.1f}"]


def wait_for_device(model: nn.Module) -> None:
    """Wait for the device of a model to finish."""
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def clock(seconds: float) -> str:
    """45 s, 12 min 05 s, 3 h 07 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
