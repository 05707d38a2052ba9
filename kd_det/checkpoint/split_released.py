"""Splits files that hold a student and its teacher, as the papers' released detection code reads and writes them.

That code (mdistiller's and ReviewKD's `RCNNKD`) keeps the teacher as a submodule: its weights are called
`teacher.backbone…`, `teacher.proposal_generator…` and `teacher.roi_heads…`, the student's have GeneralizedRCNN's names,
and ReviewKD's fusion is under `kd_trans`. Files to start from hold a whole teacher and an ImageNet backbone;
checkpoints hold both detectors whole.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import Tensor

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_whole
from kd_core.utils.state_dict import check_fit
from kd_det.checkpoint.classifier_weights import read_state_dict
from kd_det.checkpoint.convert_classifier import (
    BASIC,
    BOTTLENECK,
    MOBILENET_V2_BLOCK,
    MOBILENET_V2_FIRST_BLOCK,
    PREFIX,
    mobilenet_names,
    some_of,
)
from kd_det.config import add_timm_config
from kd_det.config.student import write_student

TEACHER = "teacher."
PARTS = ("backbone.", "proposal_generator.", "roi_heads.")  # of a GeneralizedRCNN
# Left out: ReviewKD's fusion of feature maps, and buffers that detectron2 creates itself.
LEFT_OUT = ("kd_trans.", "pixel_mean", "pixel_std", "teacher_pixel_mean", "teacher_pixel_std")
BASE = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml"
# The released MobileNetV2 has its layers in one Sequential a block: torchvision's places → these.
MOBILENET_PLACES = {
    MOBILENET_V2_FIRST_BLOCK: {"conv.0.0": "conv.0", "conv.0.1": "conv.1", "conv.1": "conv.3", "conv.2": "conv.4"},
    MOBILENET_V2_BLOCK: {
        "conv.0.0": "conv.0", "conv.0.1": "conv.1", "conv.1.0": "conv.3", "conv.1.1": "conv.4", "conv.2": "conv.6",
        "conv.3": "conv.7",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Detector:
    """Weights with GeneralizedRCNN's names, and the config of the model that they fit exactly.

    Attributes:
        whole: False for a backbone only.
    """

    state_dict: dict[str, Tensor]
    config: CfgNode
    whole: bool


def read_merged(path: str) -> tuple[Detector, Detector]:
    """(student, teacher) of a merged file.

    Raises:
        UserError: no such file, one that cannot be read, or what `split` refuses.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no file {path}")
    return split(read_state_dict(Path(path)))


def split(weights: dict[str, Tensor]) -> tuple[Detector, Detector]:
    """(student, teacher) of merged weights.

    Raises:
        UserError: there is no teacher, or weights that fit neither: each kind is named.
    """
    own = {name: value for name, value in weights.items() if not name.startswith(LEFT_OUT)}
    teacher = {name.removeprefix(TEACHER): value for name, value in own.items() if name.startswith(TEACHER)}
    student = {name: value for name, value in own.items() if not name.startswith(TEACHER)}
    if not teacher or not student:
        raise UserError(f"no student and teacher in one file: the names are {some_of(weights)}")
    return detector(student, "the student"), detector(teacher, "the teacher")


def detector(weights: dict[str, Tensor], who: str) -> Detector:
    """The detector or backbone of `weights`, checked against the model that its inferred config builds."""
    weights = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    weights = {name: value for name, value in weights.items() if "cell_anchors" not in name and "pixel_" not in name}
    if not any(name.startswith(PARTS) for name in weights):  # a bare backbone
        weights = {PREFIX + name: value for name, value in weights.items()}
    weights = renamed_mobilenet(weights)
    config = infer_config(weights, who)
    whole = any(name.startswith("roi_heads.") for name in weights)
    expected = expected_weights(config, whole, any(".fpn_" in name for name in weights))
    check_fit(weights, expected, who)
    return Detector({name: weights[name].float().contiguous() for name in expected}, config, whole)


def save(found: Detector, path: str | os.PathLike) -> list[Path]:
    """Write the weights, and beside those of a whole detector the yaml that builds it; each whole or not at all."""
    weights = Path(path)
    weights.parent.mkdir(parents=True, exist_ok=True)
    content = {"model": found.state_dict, "__author__": "taken out of a merged file by tools/convert_weights.py"}
    write_whole(weights, lambda file: torch.save(content, file))
    if not found.whole:
        return [weights]
    config = found.config.clone()
    config.MODEL.WEIGHTS = str(weights.resolve())
    write_student(config, weights.with_suffix(".yaml"))
    return [weights, weights.with_suffix(".yaml")]


def renamed_mobilenet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The released MobileNetV2's names as timm's; other weights as they are."""
    names = {}
    for torchvision_name, timm_name in mobilenet_names().items():
        names[PREFIX + released_name(torchvision_name)] = PREFIX + timm_name
    return {names.get(name, name): value for name, value in weights.items()}


def released_name(name: str) -> str:
    """torchvision's name of a MobileNetV2 weight → the released code's: features.1.conv.0.1.bias → …conv.1.bias."""
    block, _, place = name.removeprefix("features.").partition(".")
    places = MOBILENET_PLACES[MOBILENET_V2_FIRST_BLOCK if block == "1" else MOBILENET_V2_BLOCK]
    layer, _, weight = place.rpartition(".")
    return f"features.{block}.{places.get(layer, layer)}.{weight}"


def infer_config(weights: dict[str, Tensor], who: str) -> CfgNode:
    """The Faster or Mask R-CNN with FPN whose shapes these are: depth, widths, classes."""
    cfg = model_zoo.get_config(BASE)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    if f"{PREFIX}conv_stem.weight" in weights:
        add_timm_config(cfg)
        cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_fpn_backbone", 0
        cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = "mobilenetv2_100", "FrozenBN"
    elif f"{PREFIX}stem.conv1.weight" in weights:
        infer_resnet(cfg.MODEL.RESNETS, weights, who)
    else:
        raise UserError(f"{who} is no ResNet or MobileNetV2 with FPN: the names are {some_of(weights)}")
    infer_heads(cfg.MODEL, weights)
    return cfg


def infer_resnet(node: CfgNode, weights: dict[str, Tensor], who: str) -> None:
    """MODEL.RESNETS from the weights of the bottom-up network."""
    blocks = {tuple(name.removeprefix(PREFIX).split(".")[:2]) for name in weights if name.startswith(f"{PREFIX}res")}
    stages = tuple(Counter(stage for stage, _ in blocks)[f"res{i}"] for i in range(2, 6))
    depths = BOTTLENECK if f"{PREFIX}res2.0.conv3.weight" in weights else BASIC
    if stages not in depths:
        raise UserError(f"{who} has {stages} blocks: only ResNets of depth 18, 34, 50, 101 and 152 are known")
    node.DEPTH = depths[stages]
    node.STEM_OUT_CHANNELS = len(weights[f"{PREFIX}stem.conv1.weight"])
    last = "conv3" if node.DEPTH >= 50 else "conv2"
    node.RES2_OUT_CHANNELS = len(weights[f"{PREFIX}res2.0.{last}.weight"])
    if node.DEPTH >= 50:
        width, per_group = weights[f"{PREFIX}res2.0.conv2.weight"].shape[:2]
        node.NUM_GROUPS, node.WIDTH_PER_GROUP = width // per_group, per_group


def infer_heads(node: CfgNode, weights: dict[str, Tensor]) -> None:
    """FPN, box head and mask head; what is not in the file keeps detectron2's default."""

    def rows(name: str, default: int) -> int:
        return len(weights[name]) if name in weights else default

    box = "roi_heads.box_head.fc"
    node.FPN.OUT_CHANNELS = rows("backbone.fpn_lateral2.weight", node.FPN.OUT_CHANNELS)
    node.ROI_BOX_HEAD.FC_DIM = rows(f"{box}1.weight", node.ROI_BOX_HEAD.FC_DIM)
    count = sum(name.startswith(box) and name.endswith(".weight") for name in weights)
    node.ROI_BOX_HEAD.NUM_FC = count or node.ROI_BOX_HEAD.NUM_FC
    scores = "roi_heads.box_predictor.cls_score.weight"
    node.ROI_HEADS.NUM_CLASSES = rows(scores, node.ROI_HEADS.NUM_CLASSES + 1) - 1
    node.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = rows("roi_heads.box_predictor.bbox_pred.weight", 0) == 4
    node.MASK_ON = any(name.startswith("roi_heads.mask_head.") for name in weights)
    if node.MASK_ON:
        node.ROI_MASK_HEAD.CONV_DIM = len(weights["roi_heads.mask_head.mask_fcn1.weight"])


def expected_weights(cfg: CfgNode, whole: bool, with_fpn: bool) -> dict[str, Tensor]:
    """The state dict of this config's model, on the meta device: shapes only."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        if whole:
            state = build_model(cfg).state_dict()
        else:
            state = {f"backbone.{name}": value for name, value in build_backbone(cfg).state_dict().items()}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return state if whole or with_fpn else {name: value for name, value in state.items() if name.startswith(PREFIX)}
