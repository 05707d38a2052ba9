"""The teacher: one frozen detector with its own architecture, weights, channel order and normalisation."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, build_model
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, ROIHeads, StandardROIHeads
from detectron2.structures import Boxes
from detectron2.utils.file_io import PathManager
from torch import Tensor

from .checkpoint import load_all_weights

logger = logging.getLogger(__name__)


class Teacher:
    """A frozen detector that classifies the boxes it is given.

    It is deliberately not an `nn.Module`: held by a student, it stands outside the student's `parameters()`,
    `state_dict()`, `train()` and DistributedDataParallel, and a deep copy of the student shares it.

    Args:
        model: the detector, or a function that builds it. The function is called when the teacher is first needed, so
        that
            inference with a student neither builds a teacher nor looks for its weights.
    """

    def __init__(self, model: GeneralizedRCNN | Callable[[], GeneralizedRCNN]) -> None:
        self._build = None if isinstance(model, GeneralizedRCNN) else model
        self._model = freeze(model) if isinstance(model, GeneralizedRCNN) else None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Teacher":
        """The teacher that a student's config names under `KD.TEACHER`."""
        return cls(partial(build_teacher, cfg.clone()))

    @property
    def model(self) -> GeneralizedRCNN:
        """The frozen detector, in eval mode."""
        return self.load()

    def load(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> GeneralizedRCNN:
        """Build the detector and load its weights, once; on the device and in the dtype of the student."""
        if self._model is None:
            # A generator of its own for the initial weights: the student draws the same numbers with or without a
            # teacher.
            with torch.random.fork_rng(devices=[]):
                self._model = freeze(self._build()).to(device=device, dtype=dtype)
        return self._model

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Carry a `.to()`, `.double()`, … of the student over; nothing to do while there is no model."""
        if self._model is not None:
            self._model._apply(function)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self

    @torch.no_grad()
    def box_logits(
        self, batched_inputs: Sequence[dict[str, Any]], input_format: str | None, boxes: Sequence[Sequence[Boxes]]
    ) -> list[Tensor]:
        """Classification logits of the teacher's box head on the student's boxes.

        Args:
            batched_inputs: what the student was given; each image (3, H, W) in `input_format`, not normalised.
            input_format: channel order of the images ("BGR", "RGB", …); None means the teacher's own.
            boxes: for each stage of the student's ROI head, the boxes of each image, in pixels of the image.

        Returns:
            For each stage, logits (N, foreground classes + background), rows ordered as the boxes are.
        """
        features = self.features(batched_inputs, input_format)
        return [stage_logits(self.model.roi_heads, features, list(stage), k) for k, stage in enumerate(boxes)]

    @torch.no_grad()
    def features(self, batched_inputs: Sequence[dict[str, Any]], input_format: str | None) -> dict[str, Tensor]:
        """Backbone features of the images under the teacher's own channel order, mean and std."""
        images = [
            {"image": convert_channels(x["image"], input_format, self.model.input_format)} for x in batched_inputs
        ]
        return self.model.backbone(self.model.preprocess_image(images).tensor)


def freeze(model: GeneralizedRCNN) -> GeneralizedRCNN:
    """Eval mode, no gradients; refuses ROI heads that cannot classify given boxes."""
    if not isinstance(model, GeneralizedRCNN):
        raise ValueError(
            f"A teacher must be a GeneralizedRCNN (a detector with an ROI head), got {type(model).__name__}"
        )
    if not isinstance(model.roi_heads, StandardROIHeads | Res5ROIHeads):  # cascade heads are standard heads
        raise ValueError(
            f"A teacher's ROI head must be Standard, Cascade or Res5, got {type(model.roi_heads).__name__}"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def convert_channels(image: Tensor, source: str | None, target: str | None) -> Tensor:
    """An image (C, H, W) in another channel order: BGR ↔ RGB, before any normalisation.

    Raises:
        ValueError: the two orders differ and are not BGR and RGB.
    """
    if source is None or target is None or source == target:
        return image
    if {source, target} == {"BGR", "RGB"}:
        return image.flip(0)
    raise ValueError(f"The teacher's INPUT.FORMAT is {target!r} and the student's {source!r}: only BGR and RGB convert")


def stage_logits(heads: ROIHeads, features: dict[str, Tensor], boxes: list[Boxes], stage: int) -> Tensor:
    """Logits (N, C) of `heads` on `boxes`: its same stage where it is a cascade, else its only one."""
    maps = [
        features[name] for name in (heads.in_features if isinstance(heads, Res5ROIHeads) else heads.box_in_features)
    ]
    if isinstance(heads, Res5ROIHeads):
        pooled = heads._shared_roi_transform(maps, boxes)
        return heads.box_predictor(pooled.mean(dim=[2, 3]))[0]
    pooled = heads.box_pooler(maps, boxes)
    if isinstance(heads, CascadeROIHeads):
        stage = min(stage, heads.num_cascade_stages - 1)
        return heads.box_predictor[stage](heads.box_head[stage](pooled))[0]
    return heads.box_predictor(heads.box_head(pooled))[0]


def teacher_config(cfg: CfgNode) -> CfgNode:
    """The complete config of the teacher that `cfg.KD.TEACHER` names, on the student's device.

    Raises:
        ValueError: no such file or model-zoo entry, or another number of classes than the student's.
    """
    from .config import kd_defaults, merge_file  # the config module names this one's keys

    name = cfg.KD.TEACHER.CONFIG_FILE
    if not name:
        raise ValueError(
            "KD.TEACHER.CONFIG_FILE is empty: name the teacher's detectron2 yaml, a path or a model-zoo name such as "
            "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml (or set KD.LOSS.NAME none)"
        )
    teacher = kd_defaults()
    merge_file(teacher, config_path(name))
    teacher.MODEL.DEVICE = cfg.MODEL.DEVICE
    teacher.MODEL.META_ARCHITECTURE = (
        "GeneralizedRCNN" if teacher.MODEL.META_ARCHITECTURE == "DistilledRCNN" else teacher.MODEL.META_ARCHITECTURE
    )
    theirs, ours = teacher.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_HEADS.NUM_CLASSES
    if theirs != ours:
        raise ValueError(
            f"The teacher ({name}) has MODEL.ROI_HEADS.NUM_CLASSES {theirs} and the student {ours}: they must agree"
        )
    return teacher


def config_path(name: str) -> str:
    """A file as it is, else the model zoo's file of that name."""
    if PathManager.isfile(name):
        return PathManager.get_local_path(name)
    try:
        return model_zoo.get_config_file(name)
    except RuntimeError:
        raise ValueError(
            f"KD.TEACHER.CONFIG_FILE: {name} is neither a file nor a name in detectron2's model zoo"
        ) from None


def build_teacher(cfg: CfgNode) -> GeneralizedRCNN:
    """Build the teacher of `cfg.KD.TEACHER` and load every weight of it; the yaml's own MODEL.WEIGHTS is never used.

    Raises:
        ValueError: names the key under KD.TEACHER and what is wrong with it.
    """
    config = teacher_config(cfg)
    convert_channels(
        torch.empty(3, 1, 1), cfg.INPUT.FORMAT, config.INPUT.FORMAT
    )  # refuse formats that cannot be converted
    weights = cfg.KD.TEACHER.WEIGHTS
    if not weights and not cfg.KD.TEACHER.ALLOW_RANDOM:
        raise ValueError(
            "KD.TEACHER.WEIGHTS is empty: name the teacher's weights (KD.TEACHER.ALLOW_RANDOM True is for tests only)"
        )
    model = build_model(config)
    if weights:
        load_all_weights(model, weights, "KD.TEACHER.WEIGHTS")
        logger.info("Teacher: %s with %s", cfg.KD.TEACHER.CONFIG_FILE, weights)
    else:
        logger.warning(
            "KD.TEACHER.ALLOW_RANDOM: the teacher's weights are random; this is no distillation, only a test of one"
        )
    return model
