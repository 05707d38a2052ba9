"""Wide residual networks for 32 px (Zagoruyko and Komodakis, arXiv 1605.07146), pre-activation blocks, no dropout.

Names of layers are those of the code released with CRD (RepDistiller) and DKD (mdistiller), whose checkpoints load as
they are. `wrn_d_k` has d layers and k times the channels. In training that code sends some feature maps through a batch
norm a second time, for methods that compare features, and so moves three running means and variances twice a step; here
they move once.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, init_weights, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks


class PreActBlock(nn.Module):
    """x + conv(relu(bn(conv(relu(bn(x)))))); where channels change, the 1×1 shortcut starts from relu(bn(x)) too."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        # A block that keeps its channels never strides: the first of stage 1 has stride 1, the other firsts widen.
        self.convShortcut = None if in_channels == channels else conv1x1(in_channels, channels, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        activated = F.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class Stage(nn.Module):
    """Blocks in a row, under the name `layer` that the published state dicts have."""

    def __init__(self, blocks: int, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        first = PreActBlock(in_channels, channels, stride)
        self.layer = nn.Sequential(first, *(PreActBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        return self.layer(x)


class CifarWideResNet(PooledClassifier):
    """Stem of 16 channels, three stages of n = (depth − 4) / 6 blocks with 16k, 32k, 64k channels, bn, relu, `fc`.

    Args:
        depth: 6n + 4.
        widen: k.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    PREACTIVATIONS = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")

    def __init__(self, depth: int, widen: int, **options: Any) -> None:
        super().__init__(64 * widen, **options)
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 4: a wide ResNet has 10, 16, 22, 28, 34, 40, … layers")
        self.conv1 = conv3x3(self.in_chans, 16)
        self.block1 = Stage(blocks, 16, 16 * widen, stride=1)
        self.block2 = Stage(blocks, 16 * widen, 32 * widen, stride=2)
        self.block3 = Stage(blocks, 32 * widen, 64 * widen, stride=2)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = self._new_classifier()
        self.feature_info = stage_info(("block1", "block2", "block3"), [16 * widen * k for k in (1, 2, 4)], (1, 2, 4))
        init_weights(self.modules())
        if self.num_classes > 0:
            nn.init.zeros_(self.fc.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """The first convolution; norms and activations are in the blocks, before their convolutions."""
        return self.conv1(x)

    def after_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The last norm and activation."""
        return F.relu(self.bn1(x))


register_networks(
    CifarWideResNet,
    cifar_cfg("fc"),
    cifar_wrn_16_1={"depth": 16, "widen": 1},
    cifar_wrn_16_2={"depth": 16, "widen": 2},  # 703,284 parameters at 100 classes
    cifar_wrn_40_1={"depth": 40, "widen": 1},  # 569,780
    cifar_wrn_40_2={"depth": 40, "widen": 2},  # 2,255,156
)
