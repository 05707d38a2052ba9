"""The papers' augmentations: timm's `create_transform` where it has them, else torchvision's pad-and-crop.

They return a uint8 tensor (3, H, W); timm's `fast_collate` and `PrefetchLoader` normalise whole batches on the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import create_transform
from timm.data.transforms import MaybePILToTensor
from torchvision import transforms as T

from kd_core.utils.errors import UserError

Transform = Callable[[Any], torch.Tensor]
Size = tuple[int, int]

# Options of timm's `create_transform` that may be set. The loader decides the others; random erasing (`re_*`) is left
# out because timm's loader draws it on the device, from a generator that SEED does not reach.
TIMM_OPTIONS = (
    "auto_augment",
    "color_jitter",
    "color_jitter_prob",
    "crop_border_pixels",
    "crop_mode",
    "crop_pct",
    "gaussian_blur_prob",
    "grayscale_prob",
    "hflip",
    "interpolation",
    "ratio",
    "scale",
    "train_crop_mode",
    "vflip",
)


def fit_size(size: Size, *augmentations: Callable) -> T.Compose:
    """Resize (bilinear) and crop images that are not `size` yet, then augment. Others are not changed."""
    return T.Compose([as_rgb, _FitSize(size), *augmentations, MaybePILToTensor()])


def as_rgb(image: Any) -> Any:
    """An image of one of torchvision's grey data sets, such as MNIST, in three channels."""
    return image if image.mode == "RGB" else image.convert("RGB")


class _FitSize:
    """Resize the shorter side to `size` and crop the centre; the identity for an image of that size."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self._fit = T.Compose([T.Resize(min(size) if size[0] == size[1] else size), T.CenterCrop(size)])

    def __call__(self, image: Any) -> Any:
        return image if (image.height, image.width) == tuple(self.size) else self._fit(image)

    def __repr__(self) -> str:
        return f"FitSize({self.size})"


def cifar(size: Size, is_training: bool) -> Transform:
    """Pad by 4, crop at random, flip (He et al., arXiv 1512.03385, section 4.2), as in the papers' released code."""
    if not is_training:
        return fit_size(size)
    return fit_size(size, T.RandomCrop(size, padding=4), T.RandomHorizontalFlip())


def digits(size: Size, is_training: bool) -> Transform:
    """Pad by 4, crop at random (ours): as for CIFAR, without the flip, since a mirrored digit is none."""
    return fit_size(size, T.RandomCrop(size, padding=4)) if is_training else fit_size(size)


def tiny_imagenet_64(size: Size, is_training: bool) -> Transform:
    """Rotate by up to 20°, flip: Tiny-ImageNet at its own 64 px, as in the released code of DOT."""
    return fit_size(size, T.RandomRotation(20), T.RandomHorizontalFlip()) if is_training else fit_size(size)


def imagenet(size: Size, is_training: bool, **timm_options: Any) -> Transform:
    """Random resized crop and flip, no colour jitter; validation: shorter side to size / 0.875, centre crop.

    The papers' released code for ImageNet, and GDKD's for Tiny-ImageNet and CUB-200-2011 too. `timm_options` (see
    `TIMM_OPTIONS`) go to timm's `create_transform`.
    """
    options = {"interpolation": "bilinear", "color_jitter": None, "crop_pct": 0.875} | timm_options
    timms = create_transform(size, is_training=is_training, use_prefetcher=True, **options)
    return T.Compose([as_rgb, *timms.transforms])


def none(size: Size, is_training: bool) -> Transform:
    """No augmentation: training images are treated as validation images."""
    return fit_size(size)


AUGMENTATIONS: dict[str, Callable[..., Transform]] = {
    function.__name__: function for function in (cifar, digits, imagenet, tiny_imagenet_64, none)
}


def build_transforms(
    augmentation: str, input_size: tuple[int, int, int], **timm_options: Any
) -> tuple[Transform, Transform]:
    """The transforms (training, validation) of an augmentation for images of `input_size` (3, H, W).

    Raises:
        UserError: an unknown name or option (the message lists the known ones), options for another than "imagenet".
    """
    if augmentation not in AUGMENTATIONS:
        known = ", ".join(sorted(AUGMENTATIONS))
        raise UserError(f"unknown augmentation {augmentation!r} (DATA.AUGMENTATION): choose one of {known}")
    if timm_options and augmentation != "imagenet":
        raise UserError(
            f"augmentation {augmentation!r} takes no options, but DATA.TIMM_OPTIONS has {sorted(timm_options)}: only "
            "'imagenet', timm's, takes some"
        )
    if unknown := sorted(set(timm_options) - set(TIMM_OPTIONS)):
        raise UserError(f"DATA.TIMM_OPTIONS has unknown options {unknown}: it takes {', '.join(TIMM_OPTIONS)}")
    build, size = AUGMENTATIONS[augmentation], tuple(input_size[-2:])
    return build(size, is_training=True, **timm_options), build(size, is_training=False, **timm_options)
