"""PASCAL VOC's layout, and its annotations as COCO json."""

import glob
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from kd_core.utils.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
EXIF_ORIENTATION, LYING = 0x0112, {5, 6, 7, 8}
FLAGS = ("difficult", "truncated")


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height as detectron2 reads a photograph: turned by its EXIF."""
    return image.size[::-1] if image.getexif().get(EXIF_ORIENTATION) in LYING else image.size


@dataclass(frozen=True)
class VocObject:
    """One <object>: its class, the edges xmin, ymin, xmax, ymax in pixels from 0, and FLAGS."""

    name: str
    edges: tuple[float, float, float, float]
    flags: dict[str, int]

    def cut(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The edges, not beyond the image's."""
        return tuple(min(max(edge, 0), limit) for edge, limit in zip(self.edges, (width, height) * 2, strict=True))


class VocDataset:
    """A folder in VOC's layout.

    Args:
        root: holds Annotations/, JPEGImages/ and, for splits, ImageSets/Main/
        one_based: pixels count from 1 and xmax, ymax lie inside the box, as VOC's devkit has it; else they are edges
    Raises:
        UserError: here and in every method: what is missing or wrong, and in which file.
    """

    def __init__(self, root: Path, one_based: bool = False) -> None:
        self.root, self.one_based = root, one_based
        for folder in ("Annotations", "JPEGImages"):
            if not (root / folder).is_dir():
                raise UserError(f"{root} has no folder {folder}: it is not in VOC's layout")

    def stems(self, split: str | None) -> list[str]:
        """The names, without suffix, that ImageSets/Main/`split`.txt lists; without a split, of all annotations."""
        if split is None:
            return sorted(path.stem for path in (self.root / "Annotations").glob("*.xml"))
        lists = self.root / "ImageSets" / "Main"
        file = lists / f"{split}.txt"
        if not file.is_file():
            there = ", ".join(sorted(path.stem for path in lists.glob("*.txt"))) or "none"
            raise UserError(f"there is no list {file}; lists found: {there}")
        stems = [self._stem(line.strip()) for line in file.read_text().splitlines() if line.strip()]
        for stem, count in Counter(stems).items():
            if count > 1:
                raise UserError(f"{file} lists {stem} {count} times")
        return stems

    def _stem(self, line: str) -> str:
        """The name in a line of a list. Lists of one class have -1, 0 or 1 after it; a name may hold spaces."""
        whole = (self.root / "Annotations" / f"{line}.xml").is_file()
        return line if whole else re.sub(r"\s+(-1|0|1)$", "", line)

    def objects(self, stem: str) -> list[VocObject]:
        """The objects of one annotation file, in its order."""
        xml = self.root / "Annotations" / f"{stem}.xml"
        return [self._object(element, xml) for element in self._parsed(xml).findall("object")]

    def class_names(self) -> list[str]:
        """Every class that occurs, whatever the split, sorted."""
        return sorted({found.name for stem in self.stems(None) for found in self.objects(stem)})

    def image(self, stem: str) -> tuple[str, int, int]:
        """File name, width and height of an image, from the image itself: what annotation files say may be stale."""
        folder = self.root / "JPEGImages"
        found = sorted(folder.glob(f"{glob.escape(stem)}.*"))
        files = [path for path in found if path.stem == stem and path.suffix.lower() in IMAGE_SUFFIXES]
        if not files:
            raise UserError(f"{folder} has no image {stem} with a suffix among {' '.join(sorted(IMAGE_SUFFIXES))}")
        try:
            with Image.open(files[0]) as image:
                size = upright_size(image)
        except OSError as error:
            raise UserError(f"{files[0]} is not an image: {error}") from error
        return files[0].name, *size

    def _parsed(self, xml: Path) -> ElementTree.Element:
        try:
            return ElementTree.parse(xml).getroot()
        except FileNotFoundError:
            raise UserError(f"there is no annotation file {xml}") from None
        except ElementTree.ParseError as error:
            raise UserError(f"{xml} is not XML: {error}") from error
        except (ValueError, LookupError) as error:  # its encoding
            raise UserError(f"{xml} cannot be read: {error}") from error

    def _object(self, element: ElementTree.Element, xml: Path) -> VocObject:
        name = (element.findtext("name") or "").strip()
        words = [element.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")]
        try:
            xmin, ymin, xmax, ymax = edges = [float(word) for word in words]
            if not all(map(math.isfinite, edges)):
                raise ValueError
        except (TypeError, ValueError):
            raise UserError(f"{xml}: object {name!r} has no box of four numbers, but {words}") from None
        if not name:
            raise UserError(f"{xml}: the object at {words} has no name")
        if self.one_based:
            xmin, ymin = xmin - 1, ymin - 1
        flags = {flag: int(element.findtext(flag, default="0").strip() == "1") for flag in FLAGS}
        return VocObject(name, (xmin, ymin, xmax, ymax), flags)


def to_coco(
    dataset: VocDataset, split: str | None, classes: list[str] | None = None, keep_difficult: bool = False
) -> tuple[dict, Counter]:
    """The COCO dict of one split, and how many boxes were left out for their `zero_area` or `cut` at the image's edge.

    Args:
        classes: all categories, in the order wanted; by default those that occur in any split, sorted
        keep_difficult: train on and count objects marked difficult like any other
    Raises:
        UserError: what is wrong, and in which file; a class that is not among `classes`.
    """
    if classes and len(set(classes)) < len(classes):
        raise UserError(f"a class is named twice in {' '.join(classes)}")
    category_ids = {name: i for i, name in enumerate(classes or dataset.class_names(), start=1)}
    images, annotations, counts = [], [], Counter(zero_area=0, cut=0)
    for image_id, stem in enumerate(dataset.stems(split), start=1):
        file_name, width, height = dataset.image(stem)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for found in dataset.objects(stem):
            if found.name not in category_ids:
                raise UserError(f"{stem}.xml has class {found.name!r}, but the classes are {', '.join(category_ids)}")
            edges = found.cut(width, height)
            if edges[2] <= edges[0] or edges[3] <= edges[1]:
                counts["zero_area"] += 1
                continue
            counts["cut"] += edges != found.edges
            ids = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_ids[found.name]}
            annotations.append(ids | _geometry(edges) | _flags(found, keep_difficult))
    categories = [{"id": i, "name": name} for name, i in category_ids.items()]
    info = {"description": f"{dataset.root.name}, {split or 'all'}, from PASCAL VOC"}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}, counts


def _geometry(edges: tuple[float, float, float, float]) -> dict:
    xmin, ymin, xmax, ymax = (int(edge) if edge == int(edge) else edge for edge in edges)
    return {"bbox": [xmin, ymin, xmax - xmin, ymax - ymin], "area": (xmax - xmin) * (ymax - ymin)}


def _flags(found: VocObject, keep_difficult: bool) -> dict:
    return {"iscrowd": 0 if keep_difficult else found.flags["difficult"], **found.flags}
