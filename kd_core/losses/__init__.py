"""Distillation losses, one file per method. What reads a config needs fvcore, and is imported when it is asked for."""

from importlib import import_module
from typing import Any

from kd_core.losses.aekt import AEKTLoss
from kd_core.losses.base import DistillationLoss
from kd_core.losses.dist import DISTLoss
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.feature import FeatureLoss
from kd_core.losses.foreground_background import ForegroundBackground
from kd_core.losses.gdkd import GDKD3Loss, GDKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.losses.review import ReviewFusion, ReviewLoss, hierarchical_context_loss
from kd_core.losses.serialization import SerializationLayer, merge_linear
from kd_core.losses.standardize import standardize_logits
from kd_core.losses.two_view import CRLDLoss, MLKDLoss, TwoViewLoss

__all__ = [
    "FEATURE_REGISTRY",
    "LOSS_REGISTRY",
    "AEKTLoss",
    "CRLDLoss",
    "DISTLoss",
    "DKDLoss",
    "DistillationLoss",
    "FeatureLoss",
    "ForegroundBackground",
    "GDKD3Loss",
    "GDKDLoss",
    "KDLoss",
    "MLKDLoss",
    "ReviewFusion",
    "ReviewLoss",
    "SerializationLayer",
    "TwoViewLoss",
    "add_feature_config",
    "add_loss_config",
    "build_loss",
    "common_options",
    "feature_options",
    "hierarchical_context_loss",
    "merge_linear",
    "standardize_logits",
]

_CONFIG = {
    **dict.fromkeys(("LOSS_REGISTRY", "add_loss_config", "build_loss", "common_options"), "config"),
    **dict.fromkeys(("FEATURE_REGISTRY", "add_feature_config", "feature_options"), "feature_config"),
}


def __getattr__(name: str) -> Any:
    if name not in _CONFIG:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_CONFIG[name]}"), name)
