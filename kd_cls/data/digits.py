"""scikit-learn's handwritten digits as 32 px RGB images: a data set without a download."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

SIZE = 32  # pixels, the CIFAR networks' input
TRAIN_IMAGES = 1198  # of 1797: two thirds


class Digits(Dataset):
    """1797 digits of 8×8 pixels (UCI "optdigits", as shipped by scikit-learn), enlarged to 32×32 RGB.

    The first two thirds are for training, the rest for validation (ours). Both hold about the same share of each digit.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, train: bool, transform: Callable | None = None) -> None:
        images, targets = load()
        part = slice(None, TRAIN_IMAGES) if train else slice(TRAIN_IMAGES, None)
        self.images, self.targets = images[part], targets[part]
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


@cache
def load() -> tuple[list[Image.Image], list[int]]:
    """All images and labels; read once for training, validation and whatever is trained next in this process."""
    from sklearn.datasets import load_digits  # imported here because only this data set needs scikit-learn

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # the originals are 0 … 16
    images = [Image.fromarray(image).resize((SIZE, SIZE)).convert("RGB") for image in pixels]  # bicubic
    return images, [int(target) for target in digits.target]
