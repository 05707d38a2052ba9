"""ShuffleNet with 3 groups for 32 px (Zhang et al., arXiv 1707.01083).

Layers and names are those of `ShuffleV1` in the code released with CRD (RepDistiller) and DKD (mdistiller), whose
checkpoints load as they are: a 1×1 stem of stride 1, no max pooling, and a ReLU after the depthwise convolution, which
the paper leaves out.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks

STEM = 24  # channels


class ShuffleUnit(nn.Module):
    """Grouped 1×1, channel shuffle, depthwise 3×3, grouped 1×1; then added to the input, or at stride 2 concatenated
    with its 3×3 average.

    The first unit of all does not group its first convolution: 24 channels are few (the paper, section 3.2).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        branch = channels - in_channels if stride == 2 else channels  # a concatenation brings in_channels more
        middle = branch // 4
        first_groups = 1 if in_channels == STEM else groups
        self.conv1, self.bn1 = conv1x1(in_channels, middle, groups=first_groups), nn.BatchNorm2d(middle)
        self.shuffle1 = nn.ChannelShuffle(first_groups)
        self.conv2, self.bn2 = conv3x3(middle, middle, stride, groups=middle), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv1x1(middle, branch, groups=groups), nn.BatchNorm2d(branch)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, in_channels, H, W) → (N, channels, H / stride, W / stride)."""
        out = self.shuffle1(F.relu(self.bn1(self.conv1(x))))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return self.relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1))
        return self.relu(out + x)


class CifarShuffleNetV1(PooledClassifier):
    """1×1 stem, three stages of units at 16, 8 and 4 px, the first of each with stride 2, `linear`.

    Args:
        widths, units: channels and number of units of the stages.
        groups: of the 1×1 convolutions.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    CLASSIFIER = "linear"

    def __init__(
        self,
        widths: tuple[int, int, int] = (240, 480, 960),
        units: tuple[int, int, int] = (4, 8, 4),
        groups: int = 3,
        **options: Any,
    ) -> None:
        super().__init__(widths[-1], **options)
        self.conv1 = conv1x1(self.in_chans, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        in_channels = STEM
        for stage, (width, count) in enumerate(zip(widths, units, strict=True), start=1):
            shapes = [(in_channels, width, 2)] + [(width, width, 1)] * (count - 1)
            self.add_module(f"layer{stage}", nn.Sequential(*(ShuffleUnit(*shape, groups) for shape in shapes)))
            in_channels = width
        self.linear = self._new_classifier()
        self.feature_info = stage_info(("layer1", "layer2", "layer3"), widths, (2, 4, 8))


# 949,258 parameters at 100 classes
register_networks(CifarShuffleNetV1, cifar_cfg("linear"), cifar_shufflev1={})
