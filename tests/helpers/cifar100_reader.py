"""CIFAR-100 from lossless strips of 500 images, as data set "cifar100_strips": test material, no part of the product.

Importing this file registers it: `create_datasets("cifar100_strips", folder)`. A check script loads it by its path
(`importlib.util.spec_from_file_location`); then a training run in that process takes `DATA.NAME cifar100_strips`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from kd_cls.data import register_dataset
from kd_cls.data.statistics import CIFAR100_MEAN, CIFAR100_STD

STRIP = (500, 32, 32, 3)  # images in a file, each 32 px RGB


class Cifar100Strips(Dataset):
    """`webp/<split>_NNN.webp`, read in the order of their names, with `<split>_fine_labels.npy`."""

    def __init__(self, folder: Path, split: str, transform: Callable | None = None) -> None:
        strips = sorted((folder / "webp").glob(f"{split}_*.webp"))
        self.images = np.concatenate([np.asarray(Image.open(strip).convert("RGB")).reshape(STRIP) for strip in strips])
        self.targets = np.load(folder / f"{split}_fine_labels.npy").tolist()
        self.classes = (folder / "fine_label_names.txt").read_text().split()
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), self.targets[index]

    def __len__(self) -> int:
        return len(self.targets)


@register_dataset("cifar100_strips", augmentation="cifar", mean=CIFAR100_MEAN, std=CIFAR100_STD)
def cifar100_strips(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    """All 50,000 training and 10,000 test images, in the official order."""
    return Cifar100Strips(root, "train"), Cifar100Strips(root, "test")
