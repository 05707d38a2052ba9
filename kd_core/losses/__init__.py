"""Distillation losses, a file per paper."""

from kd_core.losses.base import DistillationLoss
from kd_core.losses.config import LOSS_REGISTRY, add_loss_config, build_loss, common_options
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.losses.standardize import standardize_logits

__all__ = [
    "LOSS_REGISTRY",
    "DKDLoss",
    "DistillationLoss",
    "KDLoss",
    "add_loss_config",
    "build_loss",
    "common_options",
    "standardize_logits",
]
