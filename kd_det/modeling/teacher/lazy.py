"""Teachers from detectron2's LazyConfig files: ViTDet, MViTv2, Swin, the LSJ baselines.

A LazyConfig is Python code: it is run where the user names it in KD.TEACHER.CONFIG_FILE, and nowhere else.
"""

import os
from collections.abc import Sequence
from typing import Any

from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from kd_core.utils.config import find_config
from kd_core.utils.errors import UserError, one_line
from kd_det.config.defaults import kd_defaults

KEY = "KD.TEACHER.CONFIG_FILE"
# detectron2's rule for SGD with momentum .9. A teacher's AdamW rate says nothing about a student's SGD.
SGD_LR_PER_IMAGE = 0.02 / 16


def is_lazy(name: str) -> bool:
    """Whether a config's name is that of a LazyConfig."""
    return name.endswith(".py")


def load_lazy(
    name: str, overrides: Sequence[str] = (), key: str = KEY, overrides_key: str = "KD.TEACHER.OVERRIDES"
) -> DictConfig:
    """The LazyConfig in a file, or of that name in the model zoo, with `key=value` overrides.

    Args:
        name: of the file.
        overrides: in detectron2's (hydra's) grammar.
        key: what named the file, for the error message.
        overrides_key: what gave the overrides.

    Raises:
        UserError: no such file; it fails when it is run; it has no `model`; an override that does not fit.
    """
    path = config_path(name, key)
    try:
        cfg = LazyConfig.load(path)
    except Exception as error:  # it is code: it may raise anything
        raise UserError(f"{key}: {name} cannot be loaded ({type(error).__name__}: {error})") from error
    if not isinstance(cfg, DictConfig) or "model" not in cfg:
        raise UserError(f"{key}: {name} has no `model`: a LazyConfig defines the detector under that name")
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
        OmegaConf.to_container(cfg.model, resolve=True)  # interpolations that lead nowhere show here
    except Exception as error:  # hydra's parser, OmegaConf and interpolations each have their own
        raise UserError(f"{overrides_key} {' '.join(overrides)}: {type(error).__name__}: {one_line(error)}") from error
    return cfg


def config_path(name: str, key: str = KEY) -> str:
    """A yaml or a LazyConfig: a file as it is, else the shipped config or the model zoo's file of that name."""
    name = find_config(name)
    if PathManager.isfile(name):
        return PathManager.get_local_path(name)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise UserError(
            f"{key}: {name} is neither a file nor a name in detectron2's model zoo (relative paths start at the "
            f"working folder, {os.getcwd()}; configs of detectron2's projects are named by their path)"
        ) from None


def build_lazy(cfg: DictConfig, key: str = KEY) -> nn.Module:
    """The detector of a LazyConfig's `model`, with random weights.

    Raises:
        UserError: an argument that a class of it does not take.
    """
    try:
        return instantiate(cfg.model)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{key}: its `model` cannot be built ({type(error).__name__}: {error})") from error


def as_yacs(cfg: DictConfig) -> CfgNode:
    """What a distillation needs to know of a LazyConfig, in kd_det's own config.

    Classes, channel order, data sets, image sizes and schedule; a Faster R-CNN with FPN stands for the network, which
    is instantiated from the LazyConfig itself. What the file does not say is left at detectron2's defaults.
    """
    found, model = kd_defaults(), cfg.model
    heads = model.get("roi_heads", model)  # a one-stage detector has its classes itself
    for node in (found.MODEL.ROI_HEADS, found.MODEL.RETINANET):
        node.NUM_CLASSES = int(heads.get("num_classes", node.NUM_CLASSES))
    if pixel_classes := select(cfg, "model.sem_seg_head.num_classes"):
        found.MODEL.SEM_SEG_HEAD.NUM_CLASSES = int(pixel_classes)
    found.INPUT.FORMAT = model.get("input_format") or found.INPUT.FORMAT
    for key, name in (("PIXEL_MEAN", "pixel_mean"), ("PIXEL_STD", "pixel_std")):
        found.MODEL[key] = list(model.get(name) or found.MODEL[key])
    for key, split in (("TRAIN", "train"), ("TEST", "test")):
        if names := select(cfg, f"dataloader.{split}.dataset.names"):
            found.DATASETS[key] = (names,) if isinstance(names, str) else tuple(names)
    set_sizes(found, cfg)
    set_schedule(found, cfg)
    return found


def set_sizes(found: CfgNode, cfg: DictConfig) -> None:
    """Image sizes: those of the evaluation, and detectron2's range of training sizes around them."""
    for augmentation in select(cfg, "dataloader.test.mapper.augmentations") or ():
        short = augmentation.get("short_edge_length")
        if short is not None:
            short = short if isinstance(short, int) else min(short)
            found.INPUT.MIN_SIZE_TRAIN = tuple(round(short * k / 800) for k in (640, 672, 704, 736, 768, 800))
            found.INPUT.MIN_SIZE_TEST = short
            found.INPUT.MAX_SIZE_TEST = found.INPUT.MAX_SIZE_TRAIN = int(augmentation.get("max_size", 1333))


def set_schedule(found: CfgNode, cfg: DictConfig) -> None:
    """Batch and length; the learning rate by detectron2's rule, unless the file trains by SGD."""
    solver = found.SOLVER
    solver.IMS_PER_BATCH = int(select(cfg, "dataloader.train.total_batch_size") or solver.IMS_PER_BATCH)
    solver.MAX_ITER = int(select(cfg, "train.max_iter") or solver.MAX_ITER)
    solver.STEPS = (solver.MAX_ITER * 8 // 12, solver.MAX_ITER * 11 // 12)
    sgd = "SGD" in str(select(cfg, "optimizer._target_"))
    rate = select(cfg, "optimizer.lr") if sgd else None
    solver.BASE_LR = float(rate or SGD_LR_PER_IMAGE * solver.IMS_PER_BATCH)


def select(cfg: DictConfig, key: str) -> Any:
    """The value under a dotted key; None where there is none, or where it cannot be resolved without a training."""
    try:
        return OmegaConf.select(cfg, key)
    except Exception:
        return None
