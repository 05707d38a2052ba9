"""Distillation losses, a file per paper."""

from kd_core.losses.aekt import AEKTLoss
from kd_core.losses.base import DistillationLoss
from kd_core.losses.config import LOSS_REGISTRY, add_loss_config, build_loss, common_options
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
