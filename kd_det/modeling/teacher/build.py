"""Builds the teachers that a student's config names, and checks their configs and weights."""

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError
from kd_det.checkpoint.checkpointer import check_local_file, load_all_weights
from kd_det.compat import square_size
from kd_det.config import kd_defaults, merge_file
from kd_det.modeling.meta_arch.registry import class_keys, plain_name
from kd_det.modeling.teacher.lazy import as_yacs, build_lazy, config_path, is_lazy, load_lazy, select
from kd_det.modeling.teacher.view import convert_channels

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def each_teacher(cfg: CfgNode) -> list[CfgNode]:
    """A copy of `cfg` for each teacher, in which `KD.TEACHER` names it.

    Raises:
        UserError: KD.TEACHERS is not a list of pairs, or KD.TEACHER names one beside it.
    """
    pairs, single = cfg.KD.TEACHERS, cfg.KD.TEACHER
    if not pairs:
        return [cfg.clone()]
    if beside := single.CONFIG_FILE or single.WEIGHTS or single.OVERRIDES:
        raise UserError(
            f"KD.TEACHERS lists {len(pairs)} teachers and KD.TEACHER names {beside} beside them: list it too, and "
            "leave KD.TEACHER.CONFIG_FILE, KD.TEACHER.WEIGHTS and KD.TEACHER.OVERRIDES empty"
        )
    copies = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) < 2 or not all(isinstance(word, str) for word in pair):
            raise UserError(
                f"KD.TEACHERS is a list of [config file, weights, key=value overrides …], but {pair!r} is none of these"
            )
        copy = cfg.clone()
        copy.defrost()
        copy.KD.TEACHER.CONFIG_FILE, copy.KD.TEACHER.WEIGHTS, *copy.KD.TEACHER.OVERRIDES = pair
        copy.KD.TEACHERS = []
        copies.append(copy)
    return copies


def teacher_builders(
    cfg: CfgNode, build: Callable[[CfgNode], Result] | None = None
) -> list[Callable[[], Result]]:
    """A function that builds it (`build_teacher`, or `build`) for each teacher that `cfg` names.

    With several teachers, its errors say which.
    """
    build = build or build_teacher
    if not cfg.KD.TEACHERS:
        return [partial(build, cfg.clone())]
    return [partial(named_in_list, index, build, one) for index, one in enumerate(each_teacher(cfg))]


def named_in_list(index: int, function: Callable[[CfgNode], Result], cfg: CfgNode) -> Result:
    """`function(cfg)` for one of KD.TEACHERS; its errors say which."""
    try:
        return function(cfg)
    except UserError as error:
        raise UserError(f"KD.TEACHERS[{index}]: {error}") from error


def teacher_config(cfg: CfgNode, any_classes: bool = False) -> CfgNode:
    """The complete config of the teacher that `cfg.KD.TEACHER` names, on the student's device.

    Of a LazyConfig it is what `lazy.as_yacs` makes of it: input, classes, data and schedule.

    Args:
        any_classes: accept another number of classes than the student's.
    Raises:
        UserError: no such file or model-zoo entry; another number of classes or an INPUT.FORMAT that does not convert.
    """
    name = cfg.KD.TEACHER.CONFIG_FILE
    if not name:
        raise UserError(
            "KD.TEACHER.CONFIG_FILE is empty: name the teacher's detectron2 yaml or LazyConfig .py, a path or a "
            "model-zoo name such as COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml (or set KD.LOSS.NAME none)"
        )
    architecture = cfg.MODEL.META_ARCHITECTURE
    if is_lazy(name):
        lazy = load_lazy(name, cfg.KD.TEACHER.OVERRIDES)
        teacher = as_yacs(lazy)
        pixels_alone = "sem_seg_head" in lazy.model and "roi_heads" not in lazy.model
        architecture = architecture or ("SemanticSegmentor" if pixels_alone else "GeneralizedRCNN")
    elif cfg.KD.TEACHER.OVERRIDES:
        raise UserError(f"KD.TEACHER.OVERRIDES is for LazyConfigs (.py), but KD.TEACHER.CONFIG_FILE is {name}")
    else:
        teacher = yacs_teacher(name)
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    keys = class_keys(architecture) if architecture else class_keys(teacher.MODEL.META_ARCHITECTURE)[:1]
    for key in keys:
        theirs, ours = lookup(teacher, key), lookup(cfg, key)
        if theirs != ours and not any_classes:
            raise UserError(f"The teacher ({name}) has {key} {theirs} and the student {ours}: they must agree")
    convert_channels(torch.empty(3, 1, 1), cfg.INPUT.FORMAT, teacher.INPUT.FORMAT)  # refuses what cannot be converted
    return teacher


def yacs_teacher(name: str) -> CfgNode:
    """The config in a yaml, without what names files of its own: KD.TEACHER.WEIGHTS has the whole detector."""
    teacher = kd_defaults()
    merge_file(teacher, config_path(name))
    teacher.MODEL.TIMM.PRETRAINED, teacher.MODEL.TIMM.WEIGHTS = False, ""
    teacher.MODEL.META_ARCHITECTURE = plain_name(teacher.MODEL.META_ARCHITECTURE)
    return teacher


def build_teacher(cfg: CfgNode) -> nn.Module:
    """Build the teacher of `cfg.KD.TEACHER` and load every weight of it; the yaml's own MODEL.WEIGHTS is never used.

    Raises:
        UserError: names the key under KD.TEACHER and what is wrong with it.
    """
    config = teacher_config(cfg)
    check_teacher_weights(cfg)
    weights = cfg.KD.TEACHER.WEIGHTS
    node = cfg.KD.TEACHER
    if is_lazy(node.CONFIG_FILE):
        model = build_lazy(lazy_teacher(node)).to(config.MODEL.DEVICE)
    else:
        model = build_model(config)
    if not hasattr(model, "input_format"):  # a SemanticSegmentor's channel order is known to its config alone
        model.input_format = config.INPUT.FORMAT
    if weights:
        load_all_weights(model, weights, "KD.TEACHER.WEIGHTS")
        logger.info("Teacher: %s with %s", cfg.KD.TEACHER.CONFIG_FILE, weights)
    else:
        logger.warning("KD.TEACHER.ALLOW_RANDOM: the teacher's weights are random; for tests only")
    return model


def lazy_teacher(node: CfgNode) -> DictConfig:
    """The LazyConfig of KD.TEACHER; its timm networks get their weights from KD.TEACHER.WEIGHTS, as all else does."""
    lazy = load_lazy(node.CONFIG_FILE, node.OVERRIDES)
    for part in (select(lazy, "model.backbone"), select(lazy, "model.backbone.bottom_up")):
        target = part.get("_target_") if OmegaConf.is_dict(part) else None
        if getattr(target, "__name__", str(target)).endswith("timm_bottom_up"):
            part.pretrained, part.weights = False, ""
    return lazy


def backbone_shape(cfg: CfgNode) -> dict[str, ShapeSpec]:
    """The maps of the backbone that `build_teacher` would build, without memory for its weights where it can.

    Raises:
        UserError: what `teacher_config` refuses; a backbone that is not registered; one that pads images to a square,
            and shrinks those that are larger, so that its maps do not lie over the student's.
    """
    config, node = teacher_config(cfg), cfg.KD.TEACHER
    lazy = is_lazy(node.CONFIG_FILE)
    build = partial(instantiate, lazy_teacher(node).model.backbone) if lazy else partial(build_backbone, config)
    try:
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    backbone = build()
            except RuntimeError:  # a constructor that reads values, as those of detectron2's ViT, MViT and Swin
                backbone = build()
    except KeyError as error:
        raise UserError(f"KD.TEACHER.CONFIG_FILE {node.CONFIG_FILE}: its backbone cannot be built: {error}") from error
    if side := square_size(backbone):
        raise UserError(
            f"KD.FEATURE.NAME: the teacher's backbone ({node.CONFIG_FILE}) pads its images to a square of {side} px, "
            "so its maps do not lie over the student's: use another teacher, or set KD.FEATURE.NAME none"
        )
    return backbone.output_shape()


def check_teacher_weights(cfg: CfgNode) -> None:
    """Refuse a teacher without weights, or with a file that is not there."""
    node = cfg.KD.TEACHER
    if not node.WEIGHTS and not node.ALLOW_RANDOM:
        raise UserError(
            "KD.TEACHER.WEIGHTS is empty: name the teacher's weights (KD.TEACHER.ALLOW_RANDOM True is for tests only)"
        )
    check_local_file("KD.TEACHER.WEIGHTS", node.WEIGHTS, "tools/train_net.py with KD.TEACHER.CONFIG_FILE trains it")
