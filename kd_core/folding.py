"""Batch norms of a frozen network folded into the convolutions before them: the same function in fewer passes."""

import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def folded_weights(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is `norm(conv(x))`, for a batch norm of fixed statistics.

        s = γ / sqrt(running_var + eps),  weight' = s · weight,  bias' = β + s · (bias − running_mean)

    Computed in float64 on the CPU (not every device has it), and rounded once.

    Args:
        weight: (C, …), of the convolution.
        bias: (C,), or None for none.
        norm: anything with `running_mean`, `running_var`, `weight` (γ), `bias` (β; None: 1 and 0) and `eps`: torch's
            and timm's batch norms, torchvision's and detectron2's FrozenBatchNorm2d.
    Returns:
        weight' and bias', of the weight's dtype, device and memory format, without gradients.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64)

    statistics = wide(norm.running_mean), wide(norm.running_var), norm.eps
    folded = fuse_conv_bn_weights(wide(weight), wide(bias), *statistics, wide(norm.weight), wide(norm.bias))
    return folded[0].detach().to(weight), folded[1].detach().to(weight)
