"""MobileNetV2 for 32 px, expansion T = 6, width w = 0.5 (Sandler et al., arXiv 1801.04381).

Layers and names are those of `mobile_half` in the code released with CRD (RepDistiller) and DKD (mdistiller), whose
checkpoints load as they are. It departs from the paper: ReLU for ReLU6, channels int(w·c) not rounded to multiples of
8, a 1×1 convolution that does not expand in the first block, and fewer strides, for 32 px.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, conv_bn_relu, init_weights, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks

# Expansion (None: the network's T), channels at width 1, blocks, stride of the first: the paper's table 2, but the
# second stage has stride 1, not 2.
STAGES = (
    (1, 16, 1, 1),
    (None, 24, 2, 1),
    (None, 32, 3, 2),
    (None, 64, 4, 2),
    (None, 96, 3, 1),
    (None, 160, 3, 2),
    (None, 320, 1, 1),
)
LAST_OF_SIZE = (1, 2, 4, 6)  # stages after which the maps get smaller, and the last


class InvertedResidual(nn.Module):
    """Expand 1×1, depthwise 3×3, project 1×1; added to the input where stride is 1 and channels are kept."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.is_residual = stride == 1 and in_channels == channels
        self.conv = nn.Sequential(
            *conv_bn_relu(conv1x1(in_channels, hidden)),
            *conv_bn_relu(conv3x3(hidden, hidden, stride, groups=hidden)),
            conv1x1(hidden, channels),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


class CifarMobileNetV2(PooledClassifier):
    """Stem of stride 2, the seven stages of `STAGES`, 1×1 to 1280 channels, `classifier`.

    Args:
        expansion: T.
        width: w, which scales every count of channels but the last.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    CLASSIFIER = "classifier"

    def __init__(self, expansion: int = 6, width: float = 0.5, **options: Any) -> None:
        super().__init__(int(1280 * max(width, 1)), **options)
        in_channels = int(32 * width)
        self.conv1 = nn.Sequential(*conv_bn_relu(conv3x3(self.in_chans, in_channels, stride=2)))
        self.blocks = nn.ModuleList()
        for factor, channels, blocks, stride in STAGES:
            channels = int(channels * width)
            shapes = [(in_channels, channels, stride)] + [(channels, channels, 1)] * (blocks - 1)
            self.blocks.append(nn.Sequential(*(InvertedResidual(*shape, factor or expansion) for shape in shapes)))
            in_channels = channels
        self.conv2 = nn.Sequential(*conv_bn_relu(conv1x1(in_channels, self.num_features)))
        self.classifier = self._new_classifier()
        names, widths = zip(*((f"blocks.{n}", int(STAGES[n][1] * width)) for n in LAST_OF_SIZE), strict=True)
        self.feature_info = stage_info(names, widths, (2, 4, 8, 16))
        init_weights(self.modules(), linear_std=0.01)

    def _new_classifier(self) -> nn.Module:
        return nn.Sequential(super()._new_classifier())  # the published name is classifier.0

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.classifier[0]

    def stages(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(N, in_chans, 32, 32) → the last maps of 16, 8, 4 and 2 px."""
        x = self.conv1(x)
        for number, stage in enumerate(self.blocks):
            x = stage(x)
            if number in LAST_OF_SIZE:
                yield x

    def after_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The last 1×1 convolution."""
        return self.conv2(x)


# 812,836 parameters at 100 classes
register_networks(CifarMobileNetV2, cifar_cfg("classifier.0", "conv1.0"), cifar_mobilenetv2={})
