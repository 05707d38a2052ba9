"""Label maps: images with a png of class ids each, for semantic segmentation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd_core.utils.errors import UserError
from kd_det.data.voc import upright_size

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


def label_map_records(image_root: str | Path, label_root: str | Path) -> list[dict[str, Any]]:
    """detectron2's dataset dicts of the images in a folder and the label maps of the same names in another.

    Folders below them are searched, too. Only the files' headers are read.

    Raises:
        UserError: no image; an image without a label map; a label map of another size than its image, or with a
            palette.
    """
    records = []
    for path, labels in label_map_pairs(image_root, label_root):
        if not labels.is_file():
            raise UserError(f"{path} has no label map: there is no {labels}")
        (width, height), size = image_size(path), label_map_size(labels)
        if size != (width, height):
            raise UserError(
                f"{labels} is {size[0]} × {size[1]} and its image {width} × {height}: a label map has the image's size"
            )
        record = {"file_name": str(path), "sem_seg_file_name": str(labels), "height": height, "width": width}
        records.append({**record, "image_id": path.stem})
    return records


def label_map_pairs(image_root: str | Path, label_root: str | Path) -> list[tuple[Path, Path]]:
    """Every image of a folder, sorted, and where its label map belongs.

    Raises:
        UserError: no image.
    """
    image_root, label_root = Path(image_root), Path(label_root)
    images = sorted(path for path in image_root.rglob("*") if path.suffix.lower() in IMAGES)
    if not images:
        raise UserError(f"{image_root} holds no image ({', '.join(IMAGES)})")
    return [(path, (label_root / path.relative_to(image_root)).with_suffix(".png")) for path in images]


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height, from the file's header; of a photograph that is turned upright by its EXIF."""
    try:
        with Image.open(path) as image:
            return upright_size(image)
    except OSError as error:
        raise UserError(f"{path} cannot be read as an image: {error}") from error


def label_map_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a label map.

    Raises:
        UserError: it has a palette whose colours detectron2 would read in the place of the ids.
    """
    size = image_size(path)
    with Image.open(path) as image:
        if image.mode == "P" and (np.asarray(image) != np.asarray(image.convert("L"))).any():
            raise UserError(
                f"{path} is a png with a palette, whose colours detectron2 reads in the place of the class ids: write "
                "the ids as grey values, PIL.Image.fromarray(numpy.array(PIL.Image.open(path))).save(path)"
            )
    return size


def check_labels(labels: np.ndarray | Tensor, num_classes: int, ignored: int, path: str) -> None:
    """Raise a UserError where a label map holds the id of no class."""
    labels = torch.as_tensor(labels)
    wrong = labels[(labels >= num_classes) & (labels != ignored) | (labels < 0) & (labels != ignored)]
    if len(wrong):
        raise UserError(
            f"{path} holds the class id {int(wrong[0])}: ids are 0 … {num_classes - 1} for the {num_classes} classes "
            f"(MODEL.SEM_SEG_HEAD.NUM_CLASSES), and {ignored} for ignored pixels (MODEL.SEM_SEG_HEAD.IGNORE_VALUE)"
        )


class CheckedLabels:
    """A mapper whose label maps are checked: their size before the crop, their ids after it.

    Args:
        mapper: a mapper of detectron2's dataset dicts.
        num_classes: of the segmentation head.
        ignored: label of ignored pixels.
    """

    def __init__(self, mapper: Callable[[dict], dict], num_classes: int, ignored: int) -> None:
        self.mapper, self.num_classes, self.ignored = mapper, num_classes, ignored

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        path = record["sem_seg_file_name"]
        size, expected = label_map_size(path), (record.get("width"), record.get("height"))
        if None not in expected and size != expected:
            raise UserError(
                f"{path} is {size[0]} × {size[1]} and its image {expected[0]} × {expected[1]}: a label map has the "
                "image's size"
            )
        mapped = self.mapper(record)
        check_labels(mapped["sem_seg"], self.num_classes, self.ignored, path)
        return mapped
