"""timm's feature extractors from the keys of MODEL.TIMM: the network, and the weights that it starts from."""

import difflib
import logging
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from torch import nn

from kd_core.utils.errors import UserError, one_line
from kd_det.checkpoint.classifier_weights import read_classifier

logger = logging.getLogger(__name__)

KWARGS_FORM = "MODEL.TIMM.KWARGS is a list of [argument, value]"
SEED = 20220308  # of the two builds that are compared; any number that no training is seeded with


def create_extractor(node: CfgNode, in_channels: int, load_weights: bool) -> nn.Module:
    """`timm.create_model(NAME, features_only=True, …)`, with pretrained weights where asked for.

    Args:
        node: `cfg.MODEL.TIMM`.
        in_channels: of the images.
        load_weights: False where MODEL.WEIGHTS is loaded later, over the whole detector or its backbone.

    Raises:
        UserError: names the key under MODEL.TIMM: a name that timm does not know, with the nearest; an argument that
            the network does not take; weights that cannot be downloaded or do not fit.
    """
    check_name(node.NAME)
    if node.PRETRAINED and node.WEIGHTS:
        raise UserError(f"MODEL.TIMM.PRETRAINED and MODEL.TIMM.WEIGHTS {node.WEIGHTS} both bring weights: keep one")
    if not load_weights and (node.PRETRAINED or node.WEIGHTS):
        logger.info("MODEL.WEIGHTS is given: MODEL.TIMM.PRETRAINED and MODEL.TIMM.WEIGHTS are not needed")
    options = {**keyword_arguments(node.KWARGS), "in_chans": in_channels, "features_only": True}
    if node.OUT_INDICES:
        options["out_indices"] = tuple(node.OUT_INDICES)
    if load_weights and node.WEIGHTS:
        return create_from_file(node, options)
    return create(node, options, pretrained=load_weights and node.PRETRAINED)


def check_name(name: str) -> None:
    """Raise a UserError for a name that timm does not know; `hf-hub:` and other addresses pass."""
    if not name:
        raise UserError(
            "MODEL.TIMM.NAME is empty: name one of timm.list_models(), such as mobilenetv2_100, resnet18, "
            "efficientnet_b0 or convnext_atto"
        )
    if ":" in name or timm.is_model(name):
        return
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
    raise UserError(f"MODEL.TIMM.NAME: timm has no model {name!r}; {hint}")


def keyword_arguments(pairs: list[Any]) -> dict[str, Any]:
    """The dictionary that MODEL.TIMM.KWARGS lists; raises a UserError for another form."""
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):
            raise UserError(f"{KWARGS_FORM}, such as [[drop_path_rate, 0.1]], but one entry is {pair!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in pairs}


def create(node: CfgNode, options: dict[str, Any], pretrained: bool) -> nn.Module:
    """The extractor; every exception of timm becomes a UserError that names the keys."""
    try:
        return timm.create_model(node.NAME, pretrained=pretrained, **options)
    except Exception as error:  # unknown tags and arguments, no network, no such extractor: timm has no class for them
        keys = "".join(f", MODEL.TIMM.{key} {node[key]}" for key in ("OUT_INDICES", "KWARGS", "WEIGHTS") if node[key])
        advice = (
            "; where there is no network, name a local file in MODEL.TIMM.WEIGHTS or MODEL.WEIGHTS instead of "
            "MODEL.TIMM.PRETRAINED"
        )
        what = "load that file into" if pretrained and node.WEIGHTS else "build"
        raise UserError(
            f"MODEL.TIMM.NAME {node.NAME}{keys}: timm cannot {what} the feature extractor ({type(error).__name__}: "
            f"{one_line(error)}){advice if pretrained and not node.WEIGHTS else ''}"
        ) from error


def create_from_file(node: CfgNode, options: dict[str, Any]) -> nn.Module:
    """The extractor with the weights of a classifier in a file, renamed and reshaped by timm as it does its own."""
    try:
        state_dict = read_classifier(node.WEIGHTS).state_dict
    except ValueError as error:
        raise UserError(f"MODEL.TIMM.WEIGHTS: {error}") from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed would seed the GPUs', too
        untouched = create(node, options, pretrained=False)
        torch.default_generator.manual_seed(SEED)
        overlay = {"state_dict": state_dict, "source": None}
        extractor = create(node, {**options, "pretrained_cfg_overlay": overlay}, pretrained=True)
    extractor.pretrained_cfg.pop("state_dict", None)
    refuse_unloaded(node, extractor, untouched)
    return extractor


def refuse_unloaded(node: CfgNode, loaded: nn.Module, untouched: nn.Module) -> None:
    """Raise a UserError where a file left a weight at its random initial value: timm skips what does not fit.

    A weight (of two dimensions or more: others start as constants) that equals the one of a build without the file, to
    the bit and from the same seed, has not been loaded.
    """
    parameters = dict(untouched.named_parameters())
    random = [name for name, value in parameters.items() if value.ndim > 1 and bool((value != value.min()).any())]
    left = [name for name in random if torch.equal(loaded.get_parameter(name), parameters[name])]
    if left:
        raise UserError(
            f"MODEL.TIMM.WEIGHTS: {node.WEIGHTS} does not fit MODEL.TIMM.NAME {node.NAME}: {len(left)} of "
            f"{len(random)} weights are not in it, the first is {left[0]}"
        )


def warn_of_other_pixels(cfg: CfgNode, pretrained_cfg: dict[str, Any]) -> None:
    """Warn where MODEL.PIXEL_MEAN or PIXEL_STD is not what the pretrained network was trained with."""
    order = slice(None, None, -1) if cfg.INPUT.FORMAT == "BGR" else slice(None)
    theirs = {f"PIXEL_{key.upper()}": [255 * value for value in pretrained_cfg[key][order]] for key in ("mean", "std")}
    for key, expected in theirs.items():
        ours = list(cfg.MODEL[key])
        if len(ours) != len(expected) or any(abs(a - b) > 1 for a, b in zip(ours, expected, strict=True)):  # of 255
            logger.warning(
                "MODEL.%s is %s, but %s was trained with %s (in INPUT.FORMAT's order, %s)",
                key, ours, cfg.MODEL.TIMM.NAME, [round(value, 3) for value in expected], cfg.INPUT.FORMAT,
            )  # fmt: skip
