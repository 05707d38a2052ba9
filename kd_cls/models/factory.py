"""Any network that timm can create, and its input statistics."""

import difflib
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import timm
import torch
from fvcore.common.config import CfgNode
from torch import nn

import kd_cls.models  # noqa: F401  (registers the papers' networks with timm)
from kd_cls.checkpoint.checkpoint import URL, fetch, load_weights, read_metadata
from kd_cls.config import parse_mapping
from kd_cls.data import dataset_statistics
from kd_cls.data.statistics import InputStats, check_stats
from kd_core.utils.errors import UserError, one_line


def create_network(name: str, num_classes: int, kwargs: str, pretrained: bool, key: str) -> nn.Module:
    """timm.create_model with errors that name the config key.

    Args:
        key: the config node that asks for it, MODEL or KD.TEACHER.

    Raises:
        UserError: timm knows no such name, has no weights for it, or the network refuses `kwargs`.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UserError(
            f"{key}.NAME is {name!r}, which timm does not know"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    options = parse_mapping(kwargs, f"{key}.KWARGS")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **options)
    except TypeError as error:
        raise UserError(f"{key}.KWARGS is {kwargs!r}, which {name} refuses: {error}") from error
    except (RuntimeError, OSError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"{key}.PRETRAINED: timm has no weights for {name}, or cannot fetch them ({one_line(error)}): set "
            f"{key}.WEIGHTS"
        ) from error


def build_student(cfg: CfgNode, num_classes: int) -> nn.Module:
    """The network of MODEL with its initial weights; its input statistics are `input_stats(cfg, model)`."""
    model = create_network(cfg.MODEL.NAME, num_classes, cfg.MODEL.KWARGS, cfg.MODEL.PRETRAINED, "MODEL")
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", new_classifier=True)
    return model


def input_stats(cfg: CfgNode, model: nn.Module, resumed: dict[str, Any] | None = None) -> InputStats:
    """The student's input: MODEL.MEAN, MODEL.STD and DATA.INPUT_SIZE.

    Where they are empty, a network that starts from weights keeps the mean and std that these were trained with, and
    one that starts from scratch takes the data set's. The size is the network's own.

    Args:
        resumed: "input" in the metadata of the run that is resumed, whose mean and std it keeps: MODEL.WEIGHTS may have
            moved since.

    Raises:
        UserError: a mean or std that is not three numbers, or a std of 0.
    """
    if resumed:
        mean, std = resumed["mean"], resumed["std"]
    elif cfg.MODEL.PRETRAINED or cfg.MODEL.WEIGHTS:
        mean, std = trained_statistics(model, cfg.MODEL.WEIGHTS)
    else:
        mean, std = dataset_statistics(cfg.DATA.NAME)
    mean, std = cfg.MODEL.MEAN or mean, cfg.MODEL.STD or std
    check_stats(mean, std, "MODEL")
    size = cfg.DATA.INPUT_SIZE or own_size(model, cfg.MODEL.KWARGS)
    check_size(model, cfg.MODEL.KWARGS, size, "MODEL", "DATA.INPUT_SIZE")
    return InputStats(tuple(mean), tuple(std), size)


def own_size(model: nn.Module, kwargs: str) -> int:
    """Side of the images that a network is made for: `img_size` of its KWARGS, else that of timm's pretrained_cfg."""
    given = parse_mapping(kwargs, "KWARGS").get("img_size")
    if given is None:
        return model.pretrained_cfg["input_size"][-1]
    return given if isinstance(given, int) else given[-1]


def check_size(model: nn.Module, kwargs: str, size: int, key: str, size_key: str) -> None:
    """Refuse images of another size than a network's own, such as a ViT's, where it cannot take them.

    Args:
        key: MODEL or KD.TEACHER.
        size_key: that sets its images' size.
    """
    own = own_size(model, kwargs)
    if size == own or not model.pretrained_cfg.get("fixed_input_size"):
        return
    try:
        with torch.no_grad():
            deepcopy(model).eval()(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{key}: this network takes images of {own} px, not {size} ({one_line(error)}): set {size_key} {own}, or "
            f'{key}.KWARGS "{{img_size: {size}}}" where the network has this argument'
        ) from error


def trained_statistics(model: nn.Module, weights: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std that weights were trained with: as a checkpoint of ours says, else timm's pretrained_cfg."""
    path = fetch(weights, "MODEL.WEIGHTS") if weights.startswith(URL) else weights
    found = read_metadata(path).get("input") or model.pretrained_cfg
    return found["mean"], found["std"]
