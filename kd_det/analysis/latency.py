"""What a detector costs at inference on this machine."""

import logging
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

logger = logging.getLogger(__name__)

RUNS = 5
COST_HEADERS = ["parameters", "GFLOPs", "ms / image"]


@dataclass(frozen=True)
class Cost:
    """What a detector costs at inference on this machine."""

    parameters: int
    gflops: float  # multiply-adds of one image
    seconds: float  # of one image, median


@torch.no_grad()
def inference_cost(model: nn.Module, image: torch.Tensor) -> Cost:
    """Parameters, multiply-adds and seconds of one image."""
    model.eval()
    inputs = [{"image": image}]
    times = []
    for _ in range(RUNS + 1):  # the first one warms up
        start = time.perf_counter()
        model(inputs)
        if next(model.parameters()).is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(parameters, multiply_adds(model, inputs) / 1e9, float(np.median(times[1:])))


def multiply_adds(model: nn.Module, inputs: list[dict]) -> int:
    """Of a forward pass in eval mode, counted as fvcore and the papers do."""
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    return counter.get_total_flops() // 2  # a multiply-add counts as two operations there


def cost_cells(cost: Cost) -> list[str]:
    """Its cells in a table under `COST_HEADERS`."""
    return [f"{cost.parameters / 1e6:.2f} M", f"{cost.gflops:.2f}", f"{1000 * cost.seconds:.0f}"]
