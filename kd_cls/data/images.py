"""Images in class folders and in lists, always read as RGB; errors name the broken file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from kd_core.utils.errors import UserError


class UnreadableImage(UserError):
    """An image file that cannot be decoded: one line, also when it comes from a loader's worker."""

    def __init__(self, message: str) -> None:
        # What a worker raises is raised again with the text of its traceback, whose last line ends with the message.
        super().__init__(message.strip().splitlines()[-1].split(f"{type(self).__name__}: ")[-1])


def read_rgb(path: str | Path) -> Image.Image:
    """The image at `path` as RGB; grey, palette and CMYK images are converted.

    Raises:
        UnreadableImage: the file cannot be read or decoded; the message names it. (timm's data set would silently
            return the next image instead.)
    """
    try:
        with Image.open(path) as image:
            return eight_bits(image).convert("RGB")
    # PIL raises SyntaxError for a broken PNG, ValueError for a broken PPM.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UnreadableImage(
            f"{path} is not a readable image ({reason}): replace or remove it; DATA.BAD_IMAGES skip leaves out such "
            "images of the training set"
        ) from error


def eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 bits per pixel scaled to 8: PIL's own conversion would cut all above 255 off, and leave white.

    Raises:
        ValueError: pixels of 32 bits, whose range is unknown.
    """
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image, dtype=np.float32) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}: save it with 8 or 16 bits")
    return image


class ImageList(Dataset):
    """Images given by path and class index, for data sets whose split or labels are in text files.

    Args:
        samples: (path, class index) pairs.
        classes: the names of all classes, in order of their index.
        transform: applied to each RGB image.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], classes: list[str], transform: Callable | None = None
    ) -> None:
        self.samples, self.classes, self.transform = list(samples), list(classes), transform

    @property
    def targets(self) -> list[int]:
        """The class index of every image."""
        return [target for _, target in self.samples]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        image = read_rgb(path)
        return (image if self.transform is None else self.transform(image)), target

    def __len__(self) -> int:
        return len(self.samples)


def class_folder(path: Path, expected: str) -> Dataset:
    """The images under `path/<class>/`, at any depth, classes in alphabetical order (torchvision's `ImageFolder`).

    Not timm's reader: it takes the innermost folder for the class, which in Tiny-ImageNet is `images`.

    Raises:
        UserError: `path` is missing or has no class folders (the message says what is `expected`), or a class folder
            is empty (the message names it).
    """
    if not path.is_dir():
        raise UserError(f"no folder {path}: {expected}")
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir())
    if not classes:
        raise UserError(f"no class folders in {path}: {expected}")
    empty = [str(folder) for folder in classes if not _has_image(folder)]
    if empty:
        raise UserError(f"class folder without an image: {', '.join(empty)}. Add images or remove the folder")
    return create_dataset("torch/image_folder", root=str(path), search_split=False, loader=read_rgb)


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in IMG_EXTENSIONS for path in folder.rglob("*"))
