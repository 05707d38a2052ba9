"""ResNets for 32 px: three stages of basic blocks (He et al., arXiv 1512.03385, section 4.2).

Names of layers and sizes are those of the code released with CRD (RepDistiller) and DKD (mdistiller), whose checkpoints
load as they are. `x4` means four times the channels in the stages and twice in the stem, as in that code.
"""

from typing import Any

from timm.models.resnet import BasicBlock, downsample_conv
from torch import nn

from kd_cls.models.cifar_net import PooledClassifier, conv3x3, init_weights, stage_info
from kd_cls.models.registry import cifar_cfg, register_networks

WIDE = (32, 64, 128, 256)  # of the x4 networks: stem, stages


class CifarResNet(PooledClassifier):
    """Stem of 3×3, then three stages of n = (depth − 2) / 6 basic blocks at 32, 16 and 8 px, then the classifier `fc`.

    Args:
        depth: 6n + 2, the number of layers with weights less the projections.
        widths: channels of the stem and of the three stages.
        options: `num_classes`, `in_chans`, `drop_rate` of `PooledClassifier`.
    """

    def __init__(self, depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64), **options: Any) -> None:
        super().__init__(widths[3], **options)
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2: such a ResNet has 8, 14, 20, … layers")
        stem, *stages = widths
        self.conv1 = conv3x3(self.in_chans, stem)
        self.bn1 = nn.BatchNorm2d(stem)
        self.layer1 = _stage(stem, stages[0], blocks, stride=1)
        self.layer2 = _stage(stages[0], stages[1], blocks, stride=2)
        self.layer3 = _stage(stages[1], stages[2], blocks, stride=2)
        self.fc = self._new_classifier()
        self.feature_info = stage_info(("layer1", "layer2", "layer3"), stages, (1, 2, 4))
        init_weights(self.modules())


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """timm's basic blocks; the first changes size and channels, over a 1×1 projection where either differs."""
    projection = None
    if stride != 1 or in_channels != channels:
        projection = downsample_conv(in_channels, channels, kernel_size=1, stride=stride)
    first = BasicBlock(in_channels, channels, stride, projection)
    return nn.Sequential(first, *(BasicBlock(channels, channels) for _ in range(blocks - 1)))


register_networks(
    CifarResNet,
    cifar_cfg("fc"),
    cifar_resnet8={"depth": 8},
    cifar_resnet14={"depth": 14},
    cifar_resnet20={"depth": 20},  # 278,324 parameters at 100 classes
    cifar_resnet32={"depth": 32},  # 472,756
    cifar_resnet44={"depth": 44},
    cifar_resnet56={"depth": 56},  # 861,620
    cifar_resnet110={"depth": 110},  # 1,736,564
    cifar_resnet8x4={"depth": 8, "widths": WIDE},  # 1,233,540
    cifar_resnet32x4={"depth": 32, "widths": WIDE},  # 7,433,860
)
