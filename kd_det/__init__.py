"""Distillation of detectron2 models through their classification logits.

Importing it registers the distilled meta-architectures, the backbone `build_timm_fpn_backbone` and the data sets
`digits_train`, `digits_val` and `digits_test`.
"""

import warnings

try:
    import detectron2
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        raise
    raise ImportError(
        "kd_det needs detectron2: run `python tools/install_detectron2.py`, or install an upstream build."
    ) from error

with warnings.catch_warnings():  # it scripts functions when it is imported, which current torch deprecates
    warnings.filterwarnings("ignore", message=r".*torch\.jit\.script", category=FutureWarning)
    import detectron2.modeling  # noqa: F401

from kd_det import data  # noqa: F401  (registers the built-in data sets)
from kd_det.config import add_kd_config, add_timm_config
from kd_det.modeling import backbone  # noqa: F401  (registers build_timm_fpn_backbone)
from kd_det.modeling.meta_arch.dense import DistilledRetinaNet
from kd_det.modeling.meta_arch.rcnn import DistilledRCNN
from kd_det.modeling.meta_arch.semantic_seg import DistilledPanopticFPN, DistilledSemanticSegmentor
from kd_det.modeling.teacher.teacher import Teacher

__all__ = [
    "DistilledPanopticFPN",
    "DistilledRCNN",
    "DistilledRetinaNet",
    "DistilledSemanticSegmentor",
    "Teacher",
    "add_kd_config",
    "add_timm_config",
]
