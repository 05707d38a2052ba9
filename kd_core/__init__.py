"""Losses and optimizers of knowledge distillation. Needs torch, numpy, fvcore and PyYAML.

    from kd_core import DKDLoss, backward_streams, deepkd_sgd, flatten_rows, to_streams

Each name is imported from its module when it is first asked for, so that `import kd_core` alone does not import torch.
"""

from importlib import import_module
from typing import Any

_MODULES = {
    "kd_core.losses": (
        "AEKTLoss", "CRLDLoss", "DISTLoss", "DKDLoss", "DistillationLoss", "FEATURE_REGISTRY", "FeatureLoss",
        "ForegroundBackground", "GDKD3Loss", "GDKDLoss", "KDLoss", "LOSS_REGISTRY", "MLKDLoss", "ReviewFusion",
        "ReviewLoss", "SerializationLayer", "add_feature_config", "add_loss_config", "build_loss",
        "hierarchical_context_loss", "merge_linear", "standardize_logits",
    ),
    "kd_core.optim": (
        "StreamAdamW", "StreamOptimizer", "StreamSGD", "deepkd_sgd", "deepkd_sgd_released", "dot_sgd",
    ),
    "kd_core.rows": ("flatten_rows",),
    "kd_core.streams": ("backward_streams", "to_streams"),
    "kd_core.topk": ("TopKSchedule",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
