"""ResNet-18 and ResNet-50 at full width with a stem for 32 px: 3×3, stride 1, no pooling (He et al., arXiv 1512.03385).

Names of layers are those of `ResNet18` and `ResNet50` in the code released with CRD (RepDistiller) and DKD
(mdistiller), whose checkpoints load as they are. That code calls the file resnetv2; the blocks are the first version's,
with the activation last.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, init_weights, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks


class ShortcutBlock(nn.Module):
    """relu(residual(x) + shortcut(x)); the shortcut is a 1×1 projection where size or channels change."""

    EXPANSION = 1

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = self.EXPANSION * channels
        self._build_residual(in_channels, channels, stride)
        self.relu = nn.ReLU()
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def _build_residual(self, in_channels: int, channels: int, stride: int) -> None:
        raise NotImplementedError

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, EXPANSION · channels, H / stride, W / stride)."""
        return self.relu(self._residual(x) + self.shortcut(x))


class Basic(ShortcutBlock):
    """3×3, 3×3."""

    def _build_residual(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1, self.bn1 = conv3x3(in_channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels), nn.BatchNorm2d(channels)

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(ShortcutBlock):
    """1×1, 3×3 (which strides), 1×1 to four times the channels."""

    EXPANSION = 4

    def _build_residual(self, in_channels: int, channels: int, stride: int) -> None:
        self.conv1, self.bn1 = conv1x1(in_channels, channels), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = conv3x3(channels, channels, stride), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = conv1x1(channels, 4 * channels), nn.BatchNorm2d(4 * channels)

    def _residual(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class CifarResNetV2(PooledClassifier):
    """Four stages of 64, 128, 256 and 512 channels (times the block's expansion) at 32, 16, 8 and 4 px.

    Args:
        block: `Basic` or `Bottleneck`.
        blocks: how many, in each stage.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    CLASSIFIER = "linear"

    def __init__(self, block: type[ShortcutBlock], blocks: tuple[int, int, int, int], **options: Any) -> None:
        super().__init__(512 * block.EXPANSION, **options)
        self.conv1 = conv3x3(self.in_chans, 64)
        self.bn1 = nn.BatchNorm2d(64)
        in_channels = 64
        for stage, count in enumerate(blocks):
            channels, stride = 64 * 2**stage, 1 if stage == 0 else 2
            layers = [block(in_channels, channels, stride)]
            in_channels = block.EXPANSION * channels
            layers += [block(in_channels, channels, stride=1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = self._new_classifier()
        names, widths = zip(*((f"layer{n + 1}", 64 * 2**n * block.EXPANSION) for n in range(4)), strict=True)
        self.feature_info = stage_info(names, widths, (1, 2, 4, 8))
        init_weights(self.modules())


register_networks(
    CifarResNetV2,
    cifar_cfg("linear"),
    cifar_resnet18={"block": Basic, "blocks": (2, 2, 2, 2)},
    cifar_resnet50={"block": Bottleneck, "blocks": (3, 4, 6, 3)},  # 23,705,252 parameters at 100 classes
)
