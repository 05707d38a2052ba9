"""Backbones that detectron2 does not have: importing this registers `build_timm_fpn_backbone`."""

from kd_det.modeling.backbone.timm_backbone import TimmBackbone
from kd_det.modeling.backbone.timm_fpn import build_timm_fpn_backbone, timm_bottom_up

__all__ = ["TimmBackbone", "build_timm_fpn_backbone", "timm_bottom_up"]
