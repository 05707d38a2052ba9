"""Distillation losses, one file per paper. What reads a config needs fvcore, and is imported when it is asked for."""

from typing import Any

from kd_core.losses.aekt import AEKTLoss
from kd_core.losses.base import DistillationLoss
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.foreground_background import ForegroundBackground
from kd_core.losses.gdkd import GDKD3Loss, GDKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.losses.serialization import SerializationLayer, merge_linear
from kd_core.losses.standardize import standardize_logits

__all__ = [
    "LOSS_REGISTRY",
    "AEKTLoss",
    "DKDLoss",
    "DistillationLoss",
    "ForegroundBackground",
    "GDKD3Loss",
    "GDKDLoss",
    "KDLoss",
    "SerializationLayer",
    "add_loss_config",
    "build_loss",
    "common_options",
    "merge_linear",
    "standardize_logits",
]

_CONFIG = ("LOSS_REGISTRY", "add_loss_config", "build_loss", "common_options")


def __getattr__(name: str) -> Any:
    if name not in _CONFIG:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kd_core.losses import config

    return getattr(config, name)
