"""ImageNet weights of torchvision and timm under the names that detectors load.

ResNets get detectron2's names (`stem.conv1.norm.weight`, `res2.0.shortcut.weight`), MobileNetV2 gets timm's, those of
`timm.create_model("mobilenetv2_100", features_only=True)`. The result has been loaded, strictly, into that backbone.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from torch import Tensor, nn

from kd_core.utils.errors import UserError, one_line
from kd_core.utils.files import write_whole
from kd_det.checkpoint.classifier_weights import PACKAGED, Classifier, read_classifier

PREFIX = "backbone.bottom_up."  # of a backbone under an FPN
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
# blocks in each stage → depth. Basic blocks have two convolutions, bottlenecks three.
BASIC = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
BOTTLENECK = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
MOBILENET_V2_STAGES = (1, 2, 3, 4, 3, 3, 1)  # blocks: Sandler et al. 2018, table 2
# torchvision's convolution and norm → timm's. The first block does not expand.
MOBILENET_V2_FIRST_BLOCK = (("conv.0.0", "conv.0.1", "conv_dw", "bn1"), ("conv.1", "conv.2", "conv_pw", "bn2"))
MOBILENET_V2_BLOCK = (
    ("conv.0.0", "conv.0.1", "conv_pw", "bn1"),
    ("conv.1.0", "conv.1.1", "conv_dw", "bn2"),
    ("conv.2", "conv.3", "conv_pwl", "bn3"),
)
SHOWN = 5  # names in an error


@dataclass(frozen=True)
class Backbone:
    """Weights with the backbone's own names, and the config keys that must go with them."""

    name: str
    state_dict: dict[str, Tensor]
    config: dict[str, Any]
    left_out: list[str] = field(default_factory=list)  # the classifier's head


def convert(classifier: Classifier) -> Backbone:
    """The backbone of a classifier.

    Raises:
        UserError: weights of another architecture, missing, left over, of another shape or not finite: each is named.
    """
    found = {name: value for name, value in classifier.state_dict.items() if not name.endswith("num_batches_tracked")}
    _refuse_non_finite(found)
    if "layer1.0.conv1.weight" in found:
        backbone = _convert_resnet(found)
    elif "features.18.0.weight" in found:
        backbone = _convert_mobilenet(found, mobilenet_names(), head=("features.18.", "classifier."))
    elif "blocks.0.0.conv_dw.weight" in found:
        same = {name: name for name in mobilenet_names().values()}
        backbone = _convert_mobilenet(found, same, head=("conv_head.", "bn2.", "classifier."))
    else:
        raise UserError(f"no ResNet or MobileNetV2 of torchvision or timm: the names are {some_of(found)}")
    backbone.config.update(_preprocessing(classifier))
    return backbone


def save(backbone: Backbone, path: str | os.PathLike, prefix: str = PREFIX) -> None:
    """Write a file that detectron2's checkpointer loads, whole or not at all.

    Without a prefix the file asks detectron2 to match names by their endings, which also serves C4 models.
    """
    content: dict[str, Any] = {"model": {prefix + name: value for name, value in backbone.state_dict.items()}}
    content["__author__"] = f"{backbone.name}, converted by tools/convert_weights.py"
    if not prefix:
        content["matching_heuristics"] = True
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(content, file))


def save_packaged(name: str, path: str | os.PathLike) -> dict[str, Any]:
    """Write a classifier of `PACKAGED` under timm's names, head included; returns the config that goes with it."""
    classifier = read_classifier(name)
    _refuse_non_finite(classifier.state_dict)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: torch.save(classifier.state_dict, file))
    network = {"MODEL.BACKBONE.NAME": "build_timm_fpn_backbone", "MODEL.TIMM.NAME": PACKAGED[name]}
    return {**network, "MODEL.TIMM.WEIGHTS": str(path), **_preprocessing(classifier)}


def _convert_resnet(found: dict[str, Tensor]) -> Backbone:
    stages, depth = _resnet_depth(found)
    state_dict, left_out = _renamed(found, _resnet_names(stages, depth), head=("fc.",), what=f"ResNet-{depth}")
    kernel = found["layer1.0.conv2.weight"]
    width, width_per_group = kernel.shape[:2] if depth >= 50 and kernel.ndim == 4 else (64, 64)
    config = {
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,  # torchvision and timm put the stride into the 3×3, Caffe2 did not
        "MODEL.RESNETS.NUM_GROUPS": width // width_per_group,
        "MODEL.RESNETS.WIDTH_PER_GROUP": width_per_group,
    }
    cfg = get_cfg()
    cfg.merge_from_list([*sum(config.items(), ()), "MODEL.RESNETS.OUT_FEATURES", ["res5"]])
    _load_strictly(lambda: build_resnet_backbone(cfg, ShapeSpec(channels=3)), state_dict, f"ResNet-{depth}")
    return Backbone(f"ResNet-{depth}", state_dict, config, left_out)


def _resnet_depth(found: Iterable[str]) -> tuple[tuple[int, ...], int]:
    """Blocks of each stage, and the depth that has them."""
    blocks = {tuple(name.split(".")[:2]) for name in found if name.startswith("layer")}
    count = Counter(stage for stage, _ in blocks)
    stages = tuple(count[f"layer{i}"] for i in range(1, 5))
    depths = BOTTLENECK if "layer1.0.conv3.weight" in found else BASIC
    if stages not in depths:
        kind = "bottleneck" if depths is BOTTLENECK else "basic"
        raise UserError(f"a ResNet with {stages} {kind} blocks: only depths 18, 34, 50, 101 and 152 can be converted")
    return stages, depths[stages]


def _resnet_names(stages: tuple[int, ...], depth: int) -> dict[str, str]:
    """torchvision's and timm's name → detectron2's, of every parameter and buffer."""
    names = _conv_and_norm("conv1", "bn1", "stem.conv1", "stem.conv1.norm")
    for stage, blocks in enumerate(stages, start=1):
        for block in range(blocks):
            old, new = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            for i in range(1, 4 if depth >= 50 else 3):
                names |= _conv_and_norm(f"{old}.conv{i}", f"{old}.bn{i}", f"{new}.conv{i}", f"{new}.conv{i}.norm")
            if block == 0 and (stage > 1 or depth >= 50):  # where the number of channels changes
                shortcut = f"{old}.downsample"
                names |= _conv_and_norm(f"{shortcut}.0", f"{shortcut}.1", f"{new}.shortcut", f"{new}.shortcut.norm")
    return names


def _convert_mobilenet(found: dict[str, Tensor], names: dict[str, str], head: tuple[str, ...]) -> Backbone:
    try:
        import timm
    except ImportError as error:
        raise UserError("MobileNetV2 is converted to timm's names, which needs timm: pip install timm") from error
    state_dict, left_out = _renamed(found, names, head, what="MobileNetV2")
    build = partial(timm.create_model, "mobilenetv2_100", features_only=True)
    _load_strictly(build, state_dict, "timm's mobilenetv2_100")
    return Backbone("MobileNetV2", state_dict, {}, left_out)


def mobilenet_names() -> dict[str, str]:
    """torchvision's name → timm's, without the head."""
    names = _conv_and_norm("features.0.0", "features.0.1", "conv_stem", "bn1")
    blocks = [(stage, block) for stage, count in enumerate(MOBILENET_V2_STAGES) for block in range(count)]
    for index, (stage, block) in enumerate(blocks, start=1):
        old, new = f"features.{index}", f"blocks.{stage}.{block}"
        for old_conv, old_norm, new_conv, new_norm in MOBILENET_V2_BLOCK if stage else MOBILENET_V2_FIRST_BLOCK:
            names |= _conv_and_norm(f"{old}.{old_conv}", f"{old}.{old_norm}", f"{new}.{new_conv}", f"{new}.{new_norm}")
    return names


def _conv_and_norm(conv: str, norm: str, new_conv: str, new_norm: str) -> dict[str, str]:
    return {f"{conv}.weight": f"{new_conv}.weight"} | {f"{norm}.{key}": f"{new_norm}.{key}" for key in BATCH_NORM}


def _renamed(
    found: dict[str, Tensor], names: dict[str, str], head: tuple[str, ...], what: str
) -> tuple[dict[str, Tensor], list[str]]:
    """`found` under its new names, and the names that belong to the head."""
    if missing := [name for name in names if name not in found]:
        raise UserError(f"{what} lacks {some_of(missing)}")
    left_out = [name for name in found if name.startswith(head)]
    if unknown := [name for name in found if name not in names and name not in left_out]:
        raise UserError(f"{what} has no place for {some_of(unknown)}: it is a variant that cannot be converted")
    return {new: found[old].float().contiguous() for old, new in names.items()}, left_out


def _load_strictly(build: Callable[[], nn.Module], state_dict: dict[str, Tensor], what: str) -> None:
    """The proof that names and shapes are right."""
    try:
        build().load_state_dict(state_dict)
    except (RuntimeError, ValueError) as error:  # ValueError: no layer has such a width
        raise UserError(f"the weights do not fit {what}: {one_line(error)}") from error


def _preprocessing(classifier: Classifier) -> dict[str, Any]:
    mean, std = ([round(255 * value, 4) for value in values] for values in (classifier.mean, classifier.std))
    return {"MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std, "INPUT.FORMAT": "RGB"}


def _refuse_non_finite(found: dict[str, Tensor]) -> None:
    if damaged := [name for name, value in found.items() if not value.isfinite().all()]:
        raise UserError(f"weights that are not finite: {some_of(damaged)}")


def some_of(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
