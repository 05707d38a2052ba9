"""ShuffleNetV2 1× for 32 px (Ma et al., arXiv 1807.11164).

Layers and names are those of `ShuffleV2` in the code released with CRD (RepDistiller) and DKD (mdistiller), whose
checkpoints load as they are: the paper's table 5 with a 1×1 stem of stride 1 and no max pooling.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks


class SplitUnit(nn.Module):
    """Half the channels pass, the other half goes through 1×1, depthwise 3×3, 1×1; then both are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.conv2, self.bn2 = conv3x3(half, half, groups=half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, channels, H, W), kept."""
        kept, x = x.chunk(2, dim=1)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn3(self.conv3(self.bn2(self.conv2(x)))))
        return self.shuffle(torch.cat([kept, x], dim=1))


class DownUnit(nn.Module):
    """Both branches take all channels and halve the size, then are concatenated and shuffled."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.bn1 = conv3x3(in_channels, in_channels, 2, groups=in_channels), nn.BatchNorm2d(in_channels)
        self.conv2, self.bn2 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv3, self.bn3 = conv1x1(in_channels, half), nn.BatchNorm2d(half)
        self.conv4, self.bn4 = conv3x3(half, half, 2, groups=half), nn.BatchNorm2d(half)
        self.conv5, self.bn5 = conv1x1(half, half), nn.BatchNorm2d(half)
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / 2, W / 2)."""
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = F.relu(self.bn3(self.conv3(x)))
        right = F.relu(self.bn5(self.conv5(self.bn4(self.conv4(right)))))
        return self.shuffle(torch.cat([left, right], dim=1))


class CifarShuffleNetV2(PooledClassifier):
    """1×1 stem, stages of one `DownUnit` and some `SplitUnit`s at 16, 8 and 4 px, 1×1 to the last width, `linear`.

    Args:
        widths: channels of the stages and of the last convolution.
        units: `SplitUnit`s of the stages.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    CLASSIFIER = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int, int] = (116, 232, 464, 1024),
        units: tuple[int, int, int] = (3, 7, 3),
        **options: Any,
    ) -> None:
        super().__init__(widths[-1], **options)
        self.conv1 = conv1x1(self.in_chans, 24)
        self.bn1 = nn.BatchNorm2d(24)
        in_channels = 24
        for stage, (width, count) in enumerate(zip(widths[:3], units, strict=True), start=1):
            layers = [DownUnit(in_channels, width), *(SplitUnit(width) for _ in range(count))]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            in_channels = width
        self.conv2 = conv1x1(in_channels, widths[3])
        self.bn2 = nn.BatchNorm2d(widths[3])
        self.linear = self._new_classifier()
        self.feature_info = stage_info(("layer1", "layer2", "layer3"), widths[:3], (2, 4, 8))

    def after_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The last 1×1 convolution."""
        return F.relu(self.bn2(self.conv2(x)))


# 1,355,528 parameters at 100 classes
register_networks(CifarShuffleNetV2, cifar_cfg("linear"), cifar_shufflev2={})
