"""The config keys of the feature loss, shared by kd_det and kd_cls, and how such a node becomes a loss."""

from collections.abc import Sequence
from typing import Any

from fvcore.common.registry import Registry

from kd_core.losses.config import share_of_training
from kd_core.losses.feature import FeatureLoss
from kd_core.losses.review import ReviewLoss
from kd_core.utils.errors import UserError

# Builders of feature losses by the name in FEATURE.NAME. A builder takes the config node and the channels of the maps,
# fine to coarse, and returns the loss:
#
#     @FEATURE_REGISTRY.register()
#     def mine(cfg, student_channels, teacher_channels):
#         return MyLoss(student_channels, teacher_channels, **feature_options(cfg))
FEATURE_REGISTRY = Registry("FEATURE")


def add_feature_config(node: Any) -> None:
    """Add the keys of every feature loss, with their defaults, to an empty CfgNode."""
    new = type(node)
    # The loss between feature maps, beside KD.LOSS or alone: none, review, or what else is in FEATURE_REGISTRY.
    node.NAME = "none"
    # Its factor.
    node.WEIGHT = 1.0
    # Share of training progress over which it rises linearly from 0 to its full weight.
    node.WARMUP = 0.0
    # The gradient stream of its terms, whose momentum they have under SOLVER.OPTIMIZER deepkd_sgd, dot_sgd or
    # stream_adamw: tog, tcg or ncg (ours: ncg, as it is distillation).
    node.STREAM = "ncg"

    node.REVIEW = new()
    # Width of the fusion. 0: the channels of the student's coarsest map, at most 512, as in the released code.
    node.REVIEW.MID_CHANNELS = 0


def distils(kd: Any) -> bool:
    """Whether a config's KD asks for a loss of either kind, and so for a teacher."""
    return kd.LOSS.NAME != "none" or kd.FEATURE.NAME != "none"


def check_feature(node: Any, warmup_key: str, training_length: float) -> None:
    """Refuse an unknown NAME and values that no feature loss takes; needs no maps.

    Raises:
        UserError: names the key under KD.FEATURE, its value and what is expected.
    """
    names = ["none", *sorted(name for name, _ in FEATURE_REGISTRY)]
    if node.NAME not in names:
        raise UserError(f"KD.FEATURE.NAME is {node.NAME!r}, but the feature losses are: {', '.join(names)}")
    try:
        FeatureLoss(**feature_options(with_warmup(node, warmup_key, training_length)))
    except ValueError as error:
        raise UserError(f"KD.FEATURE: {error}") from error
    if node.REVIEW.MID_CHANNELS < 0:
        raise UserError(f"KD.FEATURE.REVIEW.MID_CHANNELS is {node.REVIEW.MID_CHANNELS}, expected a whole number ≥ 0")


def build_feature_loss(
    node: Any,
    student_channels: Sequence[int],
    teacher_channels: Sequence[int],
    warmup_key: str,
    training_length: float,
) -> FeatureLoss:
    """The feature loss of a config's KD.FEATURE, which names one.

    Args:
        node: KD.FEATURE; it is not changed.
        student_channels, teacher_channels: of the maps, fine to coarse.
        warmup_key: key of the node that holds the warm-up's length, WARMUP_ITERS or WARMUP_EPOCHS.
        training_length: length of the training in the same unit.

    Raises:
        UserError: what `check_feature` refuses, or the loss itself.
    """
    check_feature(node, warmup_key, training_length)
    node = with_warmup(node, warmup_key, training_length)
    try:
        return FEATURE_REGISTRY.get(node.NAME)(node, list(student_channels), list(teacher_channels))
    except ValueError as error:
        raise UserError(f"KD.FEATURE {node.NAME}: {error}") from error


def with_warmup(node: Any, warmup_key: str, training_length: float) -> Any:
    """A copy of KD.FEATURE in which WARMUP is the share that `warmup_key` gives."""
    return share_of_training(node, "KD.FEATURE", warmup_key, training_length)


def feature_options(cfg: Any) -> dict[str, Any]:
    """The keyword arguments that every `FeatureLoss` takes."""
    return {"weight": cfg.WEIGHT, "warmup": cfg.WARMUP, "stream": cfg.STREAM}


@FEATURE_REGISTRY.register()
def review(cfg: Any, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> ReviewLoss:
    """FEATURE.NAME review, keys REVIEW."""
    return ReviewLoss(student_channels, teacher_channels, cfg.REVIEW.MID_CHANNELS, **feature_options(cfg))
