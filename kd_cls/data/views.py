"""A weak and a strong view of each image, for losses that compare the two (MLKD, CRLD)."""

import random
from typing import Any

import torch
from PIL import Image, ImageDraw
from timm.data.auto_augment import RandAugment, rand_augment_ops
from torchvision.transforms import Compose

# FixMatch's operations under timm's names, in the ranges of MLKD's and CRLD's released code, but for Color, Contrast,
# Brightness and Sharpness: a factor of 0.1 to 1.9 here, 0.05 to 0.95 there. timm has no "identity", the fourteenth.
STRONG_OPERATIONS = (
    "AutoContrast",
    "Brightness",
    "Color",
    "Contrast",
    "Equalize",
    "PosterizeOriginal",  # 4 to 8 bits
    "Rotate",
    "Sharpness",
    "ShearX",
    "ShearY",
    "Solarize",
    "TranslateXRel",
    "TranslateYRel",
)
CUTOUT_COLOUR = (125, 123, 114)  # released code
LARGEST_CUTOUT = 0.5  # of the width


class TwoViews:
    """Maps an image to its weak and its strong view, one above the other in a uint8 tensor (6, H, W).

    The weak view is drawn first, so it is the image that training with one view would see.

    Args:
        weak: the augmentation of one view; its last step makes a uint8 tensor (3, H, W) of the image.
    """

    def __init__(self, weak: Compose) -> None:
        self.weak, self.strong = weak, strong_view(weak)

    def __call__(self, image: Any) -> torch.Tensor:
        return torch.cat([self.weak(image), self.strong(image)])

    def __repr__(self) -> str:
        return f"TwoViews(weak={self.weak}, strong={self.strong})"


def strong_view(weak: Compose) -> Compose:
    """`weak` with RandAugment (two operations of random strength) and cutout before its last step."""
    steps = list(weak.transforms)
    return Compose([*steps[:-1], fixmatch_augment(), Cutout(LARGEST_CUTOUT), steps[-1]])


def fixmatch_augment() -> RandAugment:
    """timm's RandAugment with the operations and ranges of FixMatch's list.

    Skipping an operation one time in fourteen is drawing the identity among fourteen.
    """
    count = len(STRONG_OPERATIONS)
    options = {
        "magnitude_std": float("inf"),  # uniform strength
        "translate_pct": 0.3,
        "img_mean": (0, 0, 0),  # what shifts in
        "interpolation": Image.Resampling.NEAREST,
    }
    operations = rand_augment_ops(10, count / (count + 1), options, list(STRONG_OPERATIONS))
    return RandAugment(operations, num_layers=2)


class Cutout:
    """Paint a square of random side, up to `largest` times the width, around a random point, in one colour."""

    def __init__(self, largest: float) -> None:
        self.largest = largest

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        side = random.random() * self.largest * width
        left, top = (max(0.0, random.random() * length - side / 2) for length in (width, height))
        image = image.copy()
        box = (int(left), int(top), min(width, int(left) + side), min(height, int(top) + side))
        ImageDraw.Draw(image).rectangle(box, CUTOUT_COLOUR)
        return image

    def __repr__(self) -> str:
        return f"Cutout(largest={self.largest})"
