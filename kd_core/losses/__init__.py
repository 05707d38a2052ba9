"""Distillation losses, one file per paper. What reads a config needs fvcore, and is imported when it is asked for."""

from typing import Any

from kd_core.losses.aekt import AEKTLoss
from kd_core.losses.base import DistillationLoss
from kd_core.losses.dist import DISTLoss
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.foreground_background import ForegroundBackground
from kd_core.losses.gdkd import GDKD3Loss, GDKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.losses.review import ReviewFusion, hierarchical_context_loss
from kd_core.losses.serialization import SerializationLayer, merge_linear
from kd_core.losses.standardize import standardize_logits
from kd_core.losses.two_view import CRLDLoss, MLKDLoss, TwoViewLoss

__all__ = [
    "LOSS_REGISTRY",
    "AEKTLoss",
    "CRLDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "ForegroundBackground",
    "GDKD3Loss",
    "GDKDLoss",
    "KDLoss",
    "MLKDLoss",
    "ReviewFusion",
    "SerializationLayer",
    "TwoViewLoss",
    "add_loss_config",
    "build_loss",
    "common_options",
    "hierarchical_context_loss",
    "merge_linear",
    "standardize_logits",
]

_CONFIG = ("LOSS_REGISTRY", "add_loss_config", "build_loss", "common_options")


def __getattr__(name: str) -> Any:
    if name not in _CONFIG:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_core.losses import config

    return getattr(config, name)
