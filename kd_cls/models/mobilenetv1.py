"""MobileNetV1 for ImageNet, the student of ResNet-50 in the papers (Howard et al., arXiv 1704.04861, table 1).

Names of layers are those of the code released with DKD (mdistiller), whose checkpoints load as they are. timm's own
`mobilenetv1_100` is the same network with ReLU6 under other names.
"""

from collections.abc import Iterator

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from kd_cls.models.cifar_net import PooledClassifier, conv1x1, conv3x3, conv_bn_relu, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks

IMAGENET = {"num_classes": 1000, "input_size": (3, 224, 224), "crop_pct": 0.875}
IMAGENET |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}

# Channels and stride of the depthwise separable convolutions after the stem.
SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
LAST_OF_SIZE = (3, 5, 11, 13)  # convolutions after which the maps get smaller, and the last


class MobileNetV1(PooledClassifier):
    """Stem of stride 2, thirteen depthwise separable convolutions, `fc`.

    Args:
        num_classes, in_chans, drop_rate: see `PooledClassifier`.
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__(1024, num_classes, in_chans, drop_rate)
        stages = [nn.Sequential(*conv_bn_relu(conv3x3(in_chans, 32, stride=2)))]
        in_channels = 32
        for channels, stride in SEPARABLE:
            depthwise = conv3x3(in_channels, in_channels, stride, groups=in_channels)
            pointwise = conv1x1(in_channels, channels)
            stages.append(nn.Sequential(*conv_bn_relu(depthwise), *conv_bn_relu(pointwise)))
            in_channels = channels
        self.model = nn.Sequential(*stages)
        self.fc = self._new_classifier()
        names, widths = zip(*((f"model.{n}", SEPARABLE[n - 1][0]) for n in LAST_OF_SIZE), strict=True)
        self.feature_info = stage_info(names, widths, (4, 8, 16, 32))

    def stages(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(N, in_chans, 224, 224) → the last maps of 56, 28, 14 and 7 px."""
        for number, layer in enumerate(self.model):
            x = layer(x)
            if number in LAST_OF_SIZE:
                yield x


# 4,231,976 parameters at 1000 classes
register_networks(MobileNetV1, cifar_cfg("fc", "model.0.0") | IMAGENET, kd_mobilenetv1={})
