"""VGG with batch normalisation and one linear layer for 32 px (Simonyan and Zisserman, arXiv 1409.1556).

Names of layers are those of the code released with CRD (RepDistiller) and DKD (mdistiller), whose checkpoints load as
they are; VGG-8 with one convolution per block is that code's own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from kd_cls.models.cifar_net import PooledClassifier, init_weights, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks

WIDTHS = (64, 128, 256, 512, 512)  # channels of the five blocks
# Convolutions in each block: the paper's table 1, columns A, B, D and E, and VGG-8.
CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class CifarVGG(PooledClassifier):
    """Five blocks of 3×3 convolutions with bias, bn and relu, 2×2 max pooling after the first three, `classifier`.

    The fourth pooling only comes with 64 px, as in the released code: at 32 px the last map stays 4×4.

    Args:
        depth: a key of `CONVOLUTIONS`.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    CLASSIFIER = "classifier"
    PREACTIVATIONS = ("block1", "block2", "block3", "block4")

    def __init__(self, depth: int, **options: Any) -> None:
        super().__init__(WIDTHS[-1], **options)
        if depth not in CONVOLUTIONS:
            raise ValueError(f"VGG of depth {depth} is unknown: choose one of {sorted(CONVOLUTIONS)}")
        for number, (width, convolutions) in enumerate(zip(WIDTHS, CONVOLUTIONS[depth], strict=True)):
            in_channels = self.in_chans if number == 0 else WIDTHS[number - 1]
            self.add_module(f"block{number}", _block(in_channels, width, convolutions))
        self.classifier = self._new_classifier()
        self.feature_info = stage_info(self.PREACTIVATIONS, WIDTHS[1:], (2, 4, 8, 8))
        init_weights(self.modules(), linear_std=0.01)

    def stages(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """(N, in_chans, 32, 32) → the maps of the last four blocks, of 16, 8, 4 and 4 px."""
        pool_fourth = x.shape[2] == 64
        x = F.max_pool2d(F.relu(self.block0(x)), 2)
        for block in (self.block1, self.block2):
            x = F.relu(block(x))
            yield x
            x = F.max_pool2d(x, 2)
        x = F.relu(self.block3(x))
        yield x
        if pool_fourth:
            x = F.max_pool2d(x, 2)
        x = F.relu(self.block4(x))
        yield x


def _block(in_channels: int, channels: int, convolutions: int) -> nn.Sequential:
    """Convolutions with bn, relu between them; the last relu is left to the caller (state-dict keys count it out)."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        in_channels = channels
    return nn.Sequential(*layers[:-1])


# VGG-8 has 3,965,028 parameters at 100 classes, VGG-13 9,462,180.
VARIANTS = {f"cifar_vgg{depth}": {"depth": depth} for depth in CONVOLUTIONS}
register_networks(CifarVGG, cifar_cfg("classifier", "block0.0"), **VARIANTS)
