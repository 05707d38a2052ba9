"""How large a backbone's feature maps are, and the FPN norm that suits them."""

import copy

import torch
from torch import Tensor, nn

# detectron2's FPN has no norm by default: it was made for ResNets, whose maps have a standard deviation near 1.
NARROWEST, WIDEST = 0.02, 4.0


@torch.no_grad()
def map_spread(bottom_up: nn.Module, images: Tensor, trained: bool) -> dict[str, float]:
    """The standard deviation of each map of `bottom_up` on normalised images (N, C, H, W).

    Args:
        trained: its norms hold statistics; without weights they are taken from these images.
    """
    network = copy.deepcopy(bottom_up).train(not trained)
    return {name: float(maps.float().std()) for name, maps in network(images).items()}


def suggest_fpn_norm(spread: dict[str, float]) -> str:
    """"GN" for maps that an FPN without norms would pass on too large or too small, else "" (detectron2's default).

    EfficientNet's maps come from linear bottlenecks: at stride 4 their standard deviation is 8. An FPN without norms
    let them grow until every box had the same score, and nothing was detected (docs/distill.md).
    """
    return "GN" if max(spread.values()) > WIDEST or min(spread.values()) < NARROWEST else ""
