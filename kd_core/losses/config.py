"""One layout of config keys for every loss, shared by kd_det and kd_cls, and the way from such a node to a loss."""

from typing import Any

from fvcore.common.registry import Registry

from kd_core.losses.base import DistillationLoss
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.topk import TopKSchedule

LOSS_REGISTRY = Registry("LOSS")
LOSS_REGISTRY.__doc__ = """Builders of losses, by the name that LOSS.NAME gives: a function of the config node that returns the loss.

    @LOSS_REGISTRY.register()
    def my_loss(cfg):
        return MyLoss(cfg.TEMPERATURE, **common_options(cfg))
"""


def add_loss_config(node: Any) -> None:
    """Add the keys of every loss, with their defaults, to an empty config node (yacs', fvcore's or detectron2's CfgNode)."""
    new = type(node)
    # none, or a name in LOSS_REGISTRY: kd, dkd, gdkd, gdkd3, gdkds, aekt.
    node.NAME = "none"
    # T of both softmaxes. 4 on CIFAR-100, 1 on ImageNet and in detectors.
    node.TEMPERATURE = 4.0
    # Factor of the whole distillation loss.
    node.WEIGHT = 1.0
    # Share of training progress over which the loss rises linearly from 0 to its full weight.
    node.WARMUP = 0.0
    # Z-score both logit vectors first (logit standardization, arXiv 2403.01427; T 2 there).
    node.STANDARDIZE = False

    node.DKD = new()
    # Weight of the target-class term (TCKD).
    node.DKD.ALPHA = 1.0
    # Weight of the non-target term (NCKD).
    node.DKD.BETA = 8.0
    # "target": the label's class against the rest; "teacher_top1": the teacher's best class against the rest.
    node.DKD.PARTITION = "target"

    # Dynamic top-k mask of the non-target distribution (DeepKD): kd, dkd, aekt.
    node.TOPK = new()
    node.TOPK.ENABLED = False
    # Share of the non-target classes admitted at the start.
    node.TOPK.START = 0.05
    # Share in the middle phase.
    node.TOPK.PLATEAU = 0.5
    # Lengths of the three phases (rise to the plateau, plateau, rise to all) as shares of training; they add up to 1 or less.
    node.TOPK.PHASES = [1 / 3, 1 / 3, 1 / 3]


def build_loss(cfg: Any) -> DistillationLoss | None:
    """The loss that a config node with the keys of `add_loss_config` describes; None for the name "none".

    Raises:
        ValueError: a name that is not registered (the message lists those that are), or a parameter that the loss refuses.
    """
    if cfg.NAME == "none":
        return None
    if cfg.NAME not in LOSS_REGISTRY:
        names = ", ".join(["none", *sorted(name for name, _ in LOSS_REGISTRY)])
        raise ValueError(f"LOSS.NAME is {cfg.NAME!r}, but the losses are: {names}")
    return LOSS_REGISTRY.get(cfg.NAME)(cfg)


def common_options(cfg: Any) -> dict[str, Any]:
    """The keyword arguments that every loss takes."""
    topk = cfg.TOPK
    return {
        "temperature": cfg.TEMPERATURE,
        "weight": cfg.WEIGHT,
        "warmup": cfg.WARMUP,
        "standardize": cfg.STANDARDIZE,
        "topk": TopKSchedule(topk.START, topk.PLATEAU, topk.PHASES) if topk.ENABLED else None,
    }


@LOSS_REGISTRY.register()
def kd(cfg: Any) -> KDLoss:
    return KDLoss(**common_options(cfg))


@LOSS_REGISTRY.register()
def dkd(cfg: Any) -> DKDLoss:
    return DKDLoss(cfg.DKD.ALPHA, cfg.DKD.BETA, partition=cfg.DKD.PARTITION, **common_options(cfg))
