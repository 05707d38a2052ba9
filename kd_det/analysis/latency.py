"""What a detector costs at inference on this machine."""

import torch
from torch import nn

from kd_core.utils.latency import COST_HEADERS, Cost, cost_cells, measure_cost

__all__ = ["COST_HEADERS", "Cost", "cost_cells", "inference_cost"]


def inference_cost(model: nn.Module, image: torch.Tensor) -> Cost:
    """Parameters, multiply-adds and seconds of one image."""
    return measure_cost(model, [{"image": image}])
