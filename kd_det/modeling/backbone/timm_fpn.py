"""`build_timm_fpn_backbone` and `build_timm_backbone`: any feature extractor of timm, with and without an FPN."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from torch import nn

from kd_core.utils.errors import UserError
from kd_det.modeling.backbone.timm_backbone import TimmBackbone, freeze_until, set_norm
from kd_det.modeling.meta_arch.registry import plain_name

IN_FEATURES = ["res2", "res3", "res4", "res5"]  # strides 4, 8, 16, 32: what p2 to p6 are made of


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The extractor that `cfg.MODEL.TIMM` describes under detectron2's FPN, with maps p2 to p6 (RetinaNet: p3 to p7).

    MODEL.FPN.IN_FEATURES names its maps as those of a ResNet, so that a ResNet's config needs no change but
    MODEL.BACKBONE.NAME and MODEL.TIMM.NAME. Where it is empty, they are `res2` to `res5`, a RetinaNet's `res3` to
    `res5`.
    MODEL.BACKBONE.FREEZE_AT k freezes every layer that `res<k>` is computed from; 0 none.

    Raises:
        UserError: names the key under MODEL and what is wrong with its value.
    """
    in_features = list(cfg.MODEL.FPN.IN_FEATURES) or IN_FEATURES[reads_p7(cfg) :]  # a RetinaNet reads no p2
    bottom_up = configured_bottom_up(cfg, input_shape, in_features, "MODEL.FPN.IN_FEATURES")
    return FPN(
        bottom_up,
        in_features=in_features,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(cfg, bottom_up, in_features[-1]),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def top_block(cfg: CfgNode, bottom_up: TimmBackbone, coarsest: str) -> nn.Module:
    """What makes the maps above the FPN's: p6, or for a RetinaNet that reads them p6 and p7, as in detectron2."""
    if not reads_p7(cfg):
        return LastLevelMaxPool()
    return LastLevelP6P7(bottom_up.output_shape()[coarsest].channels, cfg.MODEL.FPN.OUT_CHANNELS, coarsest)


def reads_p7(cfg: CfgNode) -> bool:
    """Whether the detector is a RetinaNet on p3 to p7."""
    return plain_name(cfg.MODEL.META_ARCHITECTURE) == "RetinaNet" and "p7" in cfg.MODEL.RETINANET.IN_FEATURES


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The extractor that `cfg.MODEL.TIMM` describes, without an FPN, for segmentation heads such as DeepLab's.

    Its maps are `res<k>`, the deepest of stride 2^k. MODEL.TIMM.KWARGS [[output_stride, 8]] dilates a network that can
    be dilated: `res3` is its last map then. MODEL.SEM_SEG_HEAD.IN_FEATURES names the maps that are used.
    """
    return configured_bottom_up(
        cfg, input_shape, list(cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES), "MODEL.SEM_SEG_HEAD.IN_FEATURES"
    )


def configured_bottom_up(cfg: CfgNode, input_shape: ShapeSpec, in_features: list[str], key: str) -> TimmBackbone:
    """The extractor of `cfg.MODEL.TIMM` with its norms and frozen layers; `key` names the maps that are asked for."""
    # timm takes a second to import
    from kd_det.modeling.backbone.timm_extractor import create_extractor, warn_of_other_pixels

    timm = cfg.MODEL.TIMM
    extractor = create_extractor(timm, input_shape.channels, load_weights=not cfg.MODEL.WEIGHTS)
    if cfg.MODEL.WEIGHTS or timm.PRETRAINED or timm.WEIGHTS:
        warn_of_other_pixels(cfg, extractor.pretrained_cfg)
    bottom_up = TimmBackbone(extractor, input_shape.channels)
    check_stages(timm.NAME, bottom_up, in_features, key)
    try:
        set_norm(bottom_up, timm.NORM)
        freeze_until(bottom_up, cfg.MODEL.BACKBONE.FREEZE_AT)
        with torch.no_grad():
            bottom_up.check_maps(in_features)
    except UserError as error:
        raise UserError(f"MODEL.TIMM.NAME {timm.NAME}: {error}") from error
    return bottom_up


def timm_bottom_up(
    name: str,
    pretrained: bool = False,
    weights: str = "",
    norm: str = "BN",
    freeze_at: int = 0,
    out_indices: Sequence[int] = (),
    kwargs: Mapping[str, Any] | None = None,
    in_channels: int = 3,
) -> TimmBackbone:
    """timm's extractor built by keyword, as a LazyConfig does: the `bottom_up` of detectron2's FPN.

    Args:
        name, pretrained, weights, norm, out_indices: MODEL.TIMM's keys of these names.
        freeze_at: MODEL.BACKBONE.FREEZE_AT.
        kwargs: more arguments of timm.create_model.
        in_channels: of the images.
    """
    from kd_det.modeling.backbone.timm_extractor import create_extractor

    node = CfgNode({"NAME": name, "PRETRAINED": pretrained, "WEIGHTS": weights, "OUT_INDICES": list(out_indices)})
    node.KWARGS = [[key, value] for key, value in (kwargs or {}).items()]
    bottom_up = TimmBackbone(create_extractor(node, in_channels, load_weights=True), in_channels)
    bottom_up.pretrained = bool(pretrained or weights)
    set_norm(bottom_up, norm)
    freeze_until(bottom_up, freeze_at)
    return bottom_up


def check_stages(name: str, bottom_up: TimmBackbone, in_features: list[str], key: str) -> None:
    """Raise a UserError where a map that `key` asks for is not among those of the extractor."""
    available = bottom_up.output_shape()
    missing = [feature for feature in in_features if feature not in available]
    if missing:
        has = ", ".join(f"{feature} (stride {spec.stride})" for feature, spec in available.items())
        raise UserError(
            f"{key} asks for {', '.join(missing)}, which MODEL.TIMM.NAME {name} does not have: its "
            f"maps are {has}. Name others there (and in the heads' IN_FEATURES to match), list "
            "more stages in MODEL.TIMM.OUT_INDICES, or choose another network"
        )
