"""`build_timm_fpn_backbone`: any feature extractor of timm under detectron2's own FPN."""

import math

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn

IN_FEATURES = ["res2", "res3", "res4", "res5"]  # strides 4, 8, 16, 32: what p2 to p6 are made of
# Not square, and not a power of two: detectors pad to a multiple of 32 and to nothing else.
PROBE_SIZE = (64, 96)


class TimmBackbone(Backbone):
    """A feature extractor of timm as detectron2's bottom-up network.

    Its feature maps are called as detectron2's ResNets call theirs: `res<k>` is the deepest map of stride 2^k,
    (N, C_k, H / 2^k, W / 2^k), also where the extractor itself puts channels last. The parameters keep the extractor's
    own names (`conv_stem.weight`, …), so that what `tools/convert_weights.py` writes for MobileNetV2 fits.

    Args:
        extractor: from `timm.create_model(name, features_only=True)`.
        in_channels: of its images.
    """

    def __init__(self, extractor: nn.Module, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        # One set of layers under two roots, this one and the extractor whose forward pass runs them: as a child, the
        # extractor would put its own name before those of all parameters.
        self.__dict__["extractor"] = extractor
        self._modules, self._parameters = extractor._modules, extractor._parameters
        self._buffers = extractor._buffers
        self._channels_last = str(getattr(extractor, "output_fmt", "NCHW")).endswith("NHWC")
        info = extractor.feature_info
        strides, channels = info.reduction(), info.channels()
        # Of several maps of one stride the deepest, which comes last.
        self._index = {stage_name(stride): i for i, stride in enumerate(strides)}
        self._out_features = list(self._index)
        self._out_feature_strides = {name: strides[i] for name, i in self._index.items()}
        self._out_feature_channels = {name: channels[i] for name, i in self._index.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by name, of normalised images (N, in_channels, H, W)."""
        maps = self.extractor.forward(images)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return {name: maps[i] for name, i in self._index.items()}

    def train(self, mode: bool = True) -> "TimmBackbone":
        self.extractor.training = mode
        return super().train(mode)

    def check_maps(self, in_features: list[str]) -> None:
        """See that the maps of an image whose sides are multiples of 32 are what `output_shape()` says.

        Raises:
            ValueError: the first map that is not, or what the network said of such an image.
        """
        maps = run_probe(self)
        height, width = PROBE_SIZE
        for name in in_features:
            spec: ShapeSpec = self.output_shape()[name]
            expected = (1, spec.channels, height // spec.stride, width // spec.stride)
            if tuple(maps[name].shape) != expected:
                raise ValueError(
                    f"its map {name} of an image of {height}×{width} px is {tuple(maps[name].shape)}, and an FPN needs "
                    f"{expected}: a network whose convolutions pad is needed"
                )


def stage_name(stride: int) -> str:
    """The name that detectron2 gives to a map of this stride."""
    return f"res{int(math.log2(stride))}"


def run_probe(bottom_up: TimmBackbone) -> dict[str, Tensor]:
    """The maps of one black image in eval mode; nothing in the network changes.

    Raises:
        ValueError: the network takes no image of such a size.
    """
    weight = next(bottom_up.parameters())
    was_training = bottom_up.training
    bottom_up.eval()
    try:
        return bottom_up(weight.new_zeros(1, bottom_up.in_channels, *PROBE_SIZE))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"it takes no image of {PROBE_SIZE[0]}×{PROBE_SIZE[1]} px ({error}); detectors feed images of every size, "
            "rounded up to multiples of 32. Some networks allow that by an argument in MODEL.TIMM.KWARGS, as Swin does "
            "by [[strict_img_size, False]]"
        ) from error
    finally:
        bottom_up.train(was_training)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The extractor that `cfg.MODEL.TIMM` describes under detectron2's FPN, with maps p2 to p6.

    MODEL.FPN.IN_FEATURES names its maps as those of a ResNet, `res2` to `res5` (all four where it is empty), so that
    a config written for a ResNet needs no other change than MODEL.BACKBONE.NAME and MODEL.TIMM.NAME.
    MODEL.BACKBONE.FREEZE_AT k freezes every layer that `res<k>` is computed from; 0 none.

    Raises:
        ValueError: names the key under MODEL and what is wrong with its value.
    """
    from kd_det.modeling.backbone.timm_backbone import freeze_until, set_norm
    from kd_det.modeling.backbone.timm_extractor import (  # timm takes a second to import
        create_extractor,
        warn_of_other_pixels,
    )

    timm = cfg.MODEL.TIMM
    extractor = create_extractor(timm, input_shape.channels, load_weights=not cfg.MODEL.WEIGHTS)
    if cfg.MODEL.WEIGHTS or timm.PRETRAINED or timm.WEIGHTS:
        warn_of_other_pixels(cfg, extractor.pretrained_cfg)
    bottom_up = TimmBackbone(extractor, input_shape.channels)
    in_features = list(cfg.MODEL.FPN.IN_FEATURES) or IN_FEATURES
    check_stages(timm.NAME, bottom_up, in_features)
    try:
        set_norm(bottom_up, timm.NORM)
        freeze_until(bottom_up, cfg.MODEL.BACKBONE.FREEZE_AT)
        with torch.no_grad():
            bottom_up.check_maps(in_features)
    except ValueError as error:
        raise ValueError(f"MODEL.TIMM.NAME {timm.NAME}: {error}") from error
    return FPN(
        bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def check_stages(name: str, bottom_up: TimmBackbone, in_features: list[str]) -> None:
    """Raise ValueError where a map that the FPN asks for is not among those of the extractor."""
    there = bottom_up.output_shape()
    missing = [feature for feature in in_features if feature not in there]
    if missing:
        has = ", ".join(f"{feature} (stride {spec.stride})" for feature, spec in there.items())
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES asks for {', '.join(missing)}, which MODEL.TIMM.NAME {name} does not have: its "
            f"maps are {has}. Name others there (and RPN.IN_FEATURES, ROI_HEADS.IN_FEATURES to match), list "
            "more stages in MODEL.TIMM.OUT_INDICES, or choose another network"
        )
