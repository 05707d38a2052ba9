"""The same view of an image in two sizes, for the student and for the teacher."""

from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from fvcore.transforms.transform import BlendTransform, CropTransform, HFlipTransform, NoOpTransform, VFlipTransform

from kd_core.losses.feature_config import distils
from kd_core.utils.errors import UserError
from kd_det.data.label_maps import CheckedLabels
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys
from kd_det.modeling.teacher.view import TEACHER_IMAGE

# Their effect does not depend on the image's size.
SIZELESS = (BlendTransform, HFlipTransform, NoOpTransform, VFlipTransform)


def build_train_mapper(cfg: CfgNode) -> Callable[[dict], dict]:
    """detectron2's mapper, or `TwoSizeMapper` where a teacher has its own image size; label maps are checked."""
    two = cfg.KD.TEACHER.IMAGE_SCALE != 1 and distils(cfg.KD)
    keys, head = class_keys(cfg.MODEL.META_ARCHITECTURE), cfg.MODEL.SEM_SEG_HEAD
    own = {"augmentations": segmentation_augmentations(cfg)} if keys == (PIXEL_CLASSES,) else {}
    mapper = (TwoSizeMapper if two else DatasetMapper)(cfg, True, **own)
    return CheckedLabels(mapper, head.NUM_CLASSES, head.IGNORE_VALUE) if PIXEL_CLASSES in keys else mapper


def segmentation_augmentations(cfg: CfgNode) -> list[T.Augmentation]:
    """Resize, crop, flip, in this order: INPUT.CROP is cut out of the resized image, as in detectron2's DeepLab.

    detectron2's mapper crops first, and boxes need that; but label maps of one size make batches of one size.
    """
    resize, *others = build_augmentation(cfg, True)
    crop = cfg.INPUT.CROP
    if not crop.ENABLED:
        return [resize, *others]
    largest = crop.get("SINGLE_CATEGORY_MAX_AREA", 1.0)  # a key of the DeepLab project
    area = T.RandomCrop_CategoryAreaConstraint(crop.TYPE, crop.SIZE, largest, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    return [resize, area, *others]


class TwoSizeMapper(DatasetMapper):
    """detectron2's `DatasetMapper`, which adds `teacher_image`: the same crop and flip, resized to `scale` times.

    The student's image, annotations and random numbers equal those of `DatasetMapper` to the bit. The teacher's image
    is made from the file's pixels, not from the student's image, so that a larger one keeps the detail.

    Args:
        is_train: as `DatasetMapper`'s.
        scale: size of the teacher's image as a factor of the student's; in a config `KD.TEACHER.IMAGE_SCALE`.
        kwargs: those of `DatasetMapper`.

    Raises:
        UserError: a scale that is not above 0; when an image is mapped, augmentations that cannot be repeated.
    """

    @configurable
    def __init__(self, is_train: bool, *, scale: float, **kwargs: Any) -> None:
        super().__init__(is_train, **kwargs)
        check_scale(scale)
        self.augmentations = RememberTransforms(self.augmentations)
        self.scale = scale

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        return {**super().from_config(cfg, is_train), "scale": cfg.KD.TEACHER.IMAGE_SCALE}

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        mapped = super().__call__(dataset_dict)
        pixels = scaled_transforms(self.augmentations.transforms, self.scale).apply_image(self.augmentations.image)
        mapped[TEACHER_IMAGE] = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        self.augmentations.image = None  # not needed any more, and mappers are long-lived
        return mapped


def check_scale(scale: float) -> None:
    """Raise a UserError for a KD.TEACHER.IMAGE_SCALE that is not above 0."""
    if scale <= 0:
        raise UserError(f"KD.TEACHER.IMAGE_SCALE is {scale}: a size must be above 0")


class RememberTransforms:
    """Augmentations that remember the last image they were given and what they did to it."""

    def __init__(self, augmentations: T.Augmentation) -> None:
        self.augmentations = augmentations
        self.image: np.ndarray | None = None
        self.transforms: T.TransformList | None = None

    def __call__(self, aug_input: T.AugInput) -> T.TransformList:
        self.image = aug_input.image
        self.transforms = self.augmentations(aug_input)
        return self.transforms


def scaled_transforms(transforms: T.TransformList, scale: float) -> T.TransformList:
    """`transforms` whose result is `scale` times as large: only the resize changes.

    Raises:
        UserError: no resize among them, or a transform after it that counts pixels.
    """
    scaled: list[T.Transform] = []
    resized = False
    for transform in transforms.transforms:
        if isinstance(transform, T.ResizeTransform):
            if resized:
                raise_unscalable("a second resize")
            resized = True
            size = (max(round(scale * side), 1) for side in (transform.new_h, transform.new_w))
            transform = T.ResizeTransform(transform.h, transform.w, *size, transform.interp)
        elif not isinstance(transform, SIZELESS) and (resized or not isinstance(transform, CropTransform)):
            raise_unscalable(type(transform).__name__)
        scaled.append(transform)
    if not resized and scale != 1:
        raise_unscalable("no resize")
    return T.TransformList(scaled)


def raise_unscalable(what: str) -> NoReturn:
    raise UserError(
        f"KD.TEACHER.IMAGE_SCALE: the augmentations have {what}; it repeats crops, then one resize, then flips and "
        "changes of colour. For others give the inputs a 'teacher_image' in a mapper of your own"
    )
