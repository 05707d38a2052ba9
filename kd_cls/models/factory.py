"""Any network that timm can create, its input statistics, and torch.compile with a way back."""

import difflib
import logging
from typing import Any, NamedTuple

import timm
import yaml
from fvcore.common.config import CfgNode
from torch import nn

import kd_cls.models  # noqa: F401  (registers the papers' networks with timm)
from kd_cls.checkpoint.checkpoint import load_weights
from kd_cls.data import dataset_statistics
from kd_core.utils.compiling import CompiledOrPlain
from kd_core.utils.errors import UserError

logger = logging.getLogger("kd_cls")


class InputStats(NamedTuple):
    """How a network wants its input: mean and std of each channel (white is 1) and the side length in pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


def parse_mapping(text: str, key: str) -> dict[str, Any]:
    """The yaml mapping in a config string.

    Raises:
        UserError: the string holds anything else.
    """
    try:
        value = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{key} is {text!r}, which is no yaml: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{key} is {text!r}, expected a yaml mapping such as '{{drop_path_rate: 0.1}}'")
    return value


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
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{key}.PRETRAINED: timm has no weights for {name}, or cannot fetch them ({reason}): set {key}.WEIGHTS"
        ) from error


def build_student(cfg: CfgNode, num_classes: int) -> nn.Module:
    """The network of MODEL with the weights it starts from; its input statistics are `input_stats(cfg, model)`."""
    model = create_network(cfg.MODEL.NAME, num_classes, cfg.MODEL.KWARGS, cfg.MODEL.PRETRAINED, "MODEL")
    if cfg.MODEL.WEIGHTS:
        load_weights(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS", new_classifier=True)
    return model


def input_stats(cfg: CfgNode, model: nn.Module) -> InputStats:
    """What MODEL.MEAN, MODEL.STD and DATA.INPUT_SIZE say.

    Left empty: a network that starts from weights keeps its own mean and std (timm's pretrained_cfg), one from scratch
    takes the data set's; the size is the network's own.

    Raises:
        UserError: a mean or std that is not three numbers, or a std of 0.
    """
    own = model.pretrained_cfg
    mean, std = (
        (own["mean"], own["std"]) if cfg.MODEL.PRETRAINED or cfg.MODEL.WEIGHTS else dataset_statistics(cfg.DATA.NAME)
    )
    mean, std = cfg.MODEL.MEAN or mean, cfg.MODEL.STD or std
    check_stats(mean, std, "MODEL")
    return InputStats(tuple(mean), tuple(std), cfg.DATA.INPUT_SIZE or own["input_size"][-1])


def check_stats(mean: Any, std: Any, key: str) -> None:
    """Raise a ValueError unless both are three numbers, and no std is 0 or less."""
    for name, values in (("MEAN", mean), ("STD", std)):
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{key}.{name} is {list(values)}, expected three numbers, for red, green and blue")
    if min(std) <= 0:
        raise UserError(f"{key}.STD is {list(std)}, expected numbers above 0")


def compile_or_plain(model: nn.Module, name: str, **options: Any) -> CompiledOrPlain:
    """`torch.compile(model, **options)`; or, with a message, `model` itself once a call fails to compile."""
    return CompiledOrPlain(model, name, log=logger, **options)
