"""Checks data sets before a training: COCO files (structure, boxes, every image) and label maps."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image

from kd_core.utils.data_check import DataReport, file_digest, in_parallel, report_shared, summary
from kd_core.utils.errors import UserError, one_line
from kd_det.data.label_maps import check_labels, label_map_pairs, label_map_size

MISSING = "image file missing"
TWICE_IMAGE = "image id used twice"
TWICE_ANNOTATION = "annotation id used twice"
NO_ID = "annotation without an id"
TWICE_CATEGORY = "category id used twice"
UNDECODABLE = "image that cannot be decoded"
OTHER_SIZE = "image of another size than the json says"
UNKNOWN_CATEGORY = "annotation of an unknown category"
MALFORMED = "entry without what it needs"
NEGATIVE_BOX = "box of negative size"
FLAT_BOX = "box without area"
BEYOND = "box that reaches out of its image (clipped in training)"
# What stops a training of detectron2, or makes it learn nonsense; the other kinds it filters or clips by itself.
FATAL = (MALFORMED, TWICE_CATEGORY, TWICE_IMAGE, TWICE_ANNOTATION, NO_ID, UNKNOWN_CATEGORY, NEGATIVE_BOX, MISSING)
UNREADABLE = (UNDECODABLE, OTHER_SIZE)  # an image that DATASETS.BAD_IMAGES skip leaves out
# What an entry needs: key → what its value is.
IMAGE = {"id": "an id", "file_name": "a word", "width": "a length", "height": "a length"}
CATEGORY = {"id": "an id", "name": "a word"}
ANNOTATION = {"image_id": "an id", "category_id": "an id", "bbox": "four numbers"}
BORDER = 1.0  # pixels that a box may reach beyond its image: annotators' rounding


class CocoFile:
    """One COCO json with its image folder, and what is wrong with them.

    Args:
        json_file: in COCO's detection format.
        image_root: where its `file_name`s start.
        annotated: it must have annotations; the images of a test may have none.
    Raises:
        UserError: the file cannot be read, or is no COCO json.
    """

    def __init__(self, json_file: str | Path, image_root: str | Path, annotated: bool = True) -> None:
        self.json_file, self.image_root = Path(json_file), Path(image_root)
        self.content = read_coco(self.json_file, annotated)
        self.report = DataReport()
        self.images: list[dict[str, Any]] = []  # the well-formed ones
        self.bad_images: set[Any] = set()  # ids
        self.bad_annotations: set[int] = set()  # places in the list
        self.digests: dict[str, str] = {}  # digest → file name, once the files were read

    def check_structure(self) -> DataReport:
        """Ids, categories, boxes, and whether each image file is there; reads no image. Seconds for COCO."""
        sizes = self._check_images()
        names = self._check_categories()
        self._check_annotations(sizes, names)
        return self.report

    def check_files(self, workers: int = 0) -> DataReport:
        """Decode every image that is there, as detectron2 does, and compare its size with the json's."""
        images = [image for image in self.images if image["id"] not in self.bad_images]
        found = in_parallel(self._look_at, images, workers)
        for image, (error, digest) in zip(images, found, strict=True):
            if error:
                kind, detail = error
                self.report.problem(kind, f"{self.image_root / image['file_name']} ({detail})")
                self.bad_images.add(image["id"])
            else:
                self.digests[digest] = image["file_name"]
        return self.report

    def cleaned(self) -> dict[str, Any]:
        """The json without what was found wrong: bad images with their annotations, bad annotations; boxes clipped."""
        seen: set[Any] = set()
        images = [
            image
            for image in self.images
            if image["id"] not in self.bad_images and not (image["id"] in seen or seen.add(image["id"]))
        ]
        sizes = {image["id"]: (image["width"], image["height"]) for image in images}
        kept = []
        for index, annotation in enumerate(self.content["annotations"]):
            if index in self.bad_annotations or annotation["image_id"] not in sizes:
                continue
            box = clipped(annotation["bbox"], *sizes[annotation["image_id"]])
            if box[2] > 0 and box[3] > 0:
                kept.append({**annotation, "bbox": box, "id": len(kept) + 1})
        return {**self.content, "images": images, "annotations": kept}

    def _look_at(self, image: dict[str, Any]) -> tuple[tuple[str, str] | None, str]:
        path = self.image_root / image["file_name"]
        try:
            height, width = read_image(str(path)).shape[:2]  # turned upright by EXIF, as in training
        except Exception as error:  # PIL raises many kinds, SyntaxError among them
            return (UNDECODABLE, one_line(error)), ""
        if (width, height) != (image["width"], image["height"]):
            return (
                OTHER_SIZE,
                f"{width} × {height}, the json says {image['width']} × {image['height']}",
            ), ""
        return None, file_digest(path)

    def _check_images(self) -> dict[Any, tuple[int, int]]:
        sizes: dict[Any, tuple[int, int]] = {}
        listings: dict[str, set[str]] = {}
        for index, image in enumerate(self.content["images"]):
            where = f"images[{index}]"
            if isinstance(image, dict) and "file_name" not in image and isinstance(image.get("coco_url"), str):
                image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])  # LVIS, as detectron2 reads it
            if wrong := malformed(image, IMAGE):
                self.report.problem(MALFORMED, f"{where} {wrong}")
                continue
            self.images.append(image)
            if image["id"] in sizes:
                self.report.problem(TWICE_IMAGE, f"{where}, id {image['id']}, {image['file_name']}")
                continue
            sizes[image["id"]] = (image["width"], image["height"])
            if not is_file(self.image_root, image["file_name"], listings):
                self.report.problem(MISSING, f"{self.image_root / image['file_name']}")
                self.bad_images.add(image["id"])
        return sizes

    def _check_categories(self) -> dict[Any, str]:
        names: dict[Any, str] = {}
        for index, category in enumerate(self.content["categories"]):
            if wrong := malformed(category, CATEGORY):
                self.report.problem(MALFORMED, f"categories[{index}] {wrong}")
            elif category["id"] in names:
                self.report.problem(TWICE_CATEGORY, f"categories[{index}], id {category['id']}")
            else:
                names[category["id"]] = category["name"]
        return names

    def _check_annotations(self, sizes: dict[Any, tuple[int, int]], names: dict[Any, str]) -> None:
        ids: set[Any] = set()
        annotated: set[Any] = set()
        counts: Counter = Counter()
        for index, annotation in enumerate(self.content["annotations"]):
            kind, detail = self._annotation_problem(annotation, sizes, names)
            if kind:
                self.report.problem(kind, f"annotations[{index}], {detail}")
                if kind != BEYOND:
                    self.bad_annotations.add(index)
                    continue
            number = annotation.get("id")
            if not is_id(number):
                self.report.problem(NO_ID, f"annotations[{index}], image {annotation['image_id']}, id {number}")
            elif number in ids:
                self.report.problem(TWICE_ANNOTATION, f"annotations[{index}], id {number}")
            else:
                ids.add(number)
            annotated.add(annotation["image_id"])
            counts[annotation["category_id"]] += 1
        for image_id in sizes.keys() - annotated:
            self.report.remark("image without annotations (not trained on)", f"id {image_id}")
        for category, name in names.items():
            if not counts[category]:
                self.report.remark("category without annotations", f"{name} (id {category})")

    def _annotation_problem(
        self, annotation: dict[str, Any], sizes: dict[Any, tuple[int, int]], names: dict[Any, str]
    ) -> tuple[str, str]:
        """The kind of the first thing that is wrong with an annotation, and what it says; ("", "") where it is fine."""
        if wrong := malformed(annotation, ANNOTATION):
            return MALFORMED, f"which {wrong}"
        box = annotation["bbox"]
        where = f"id {annotation.get('id')}, image {annotation['image_id']}, bbox {box}"
        if annotation["image_id"] not in sizes:
            return "annotation of an image that is not listed", where
        if annotation["category_id"] not in names:
            return UNKNOWN_CATEGORY, f"category_id {annotation['category_id']}, {where}"
        if box[2] < 0 or box[3] < 0:
            return NEGATIVE_BOX, where
        if box[2] == 0 or box[3] == 0:
            return FLAT_BOX, where
        width, height = sizes[annotation["image_id"]]
        if min(box[0], box[1]) < -BORDER or box[0] + box[2] > width + BORDER or box[1] + box[3] > height + BORDER:
            return BEYOND, f"{where}, of {width} × {height}"
        return "", ""


class LabelMaps:
    """Images with a label map each, and what is wrong with them.

    Args:
        name: of the data set.
        pairs: image file and label map of each.
        num_classes, ignored: of the segmentation head: ids are below `num_classes`, or `ignored`.
    """

    def __init__(self, name: str, pairs: Sequence[tuple[Path, Path]], num_classes: int, ignored: int) -> None:
        self.name, self.pairs, self.num_classes, self.ignored = name, pairs, num_classes, ignored
        self.report = DataReport()
        self.digests: dict[str, str] = {}  # digest → file name, once the files were read

    def check_files(self, workers: int = 0) -> DataReport:
        """Decode every image and label map; compare their sizes, and the ids with the number of classes."""
        found = in_parallel(self._look_at, self.pairs, workers)
        for (image, _), (problem, digest) in zip(self.pairs, found, strict=True):
            if problem:
                self.report.problem(*problem)
            else:
                self.digests[digest] = image.name
        return self.report

    def _look_at(self, pair: tuple[Path, Path]) -> tuple[tuple[str, str] | None, str]:
        image, labels = pair
        try:
            height, width = read_image(str(image)).shape[:2]
        except Exception as error:  # PIL raises many kinds, SyntaxError among them
            return (UNDECODABLE, f"{image} ({one_line(error)})"), ""
        if not labels.is_file():
            return ("image without a label map", f"{image} (there is no {labels})"), ""
        try:
            size = label_map_size(labels)
            check_labels(read_image(str(labels), "L").copy(), self.num_classes, self.ignored, str(labels))
        except Exception as error:
            return ("label map that is wrong", one_line(error)), ""
        if size != (width, height):
            return ("label map of another size than its image", f"{labels} ({size[0]} × {size[1]}, the image "
                    f"{width} × {height})"), ""  # fmt: skip
        return None, file_digest(image)


def read_coco(path: Path, annotated: bool) -> dict[str, Any]:
    """The content of a COCO json.

    Raises:
        UserError: no such file, no json, one of COCO's lists is not in it, or no annotation where it must be
            `annotated`.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except ValueError as error:
        raise UserError(f"{path} is no json that can be read: {error}") from error
    lists = ("images", "annotations", "categories")
    if isinstance(content, dict) and not annotated:
        content.setdefault("annotations", [])
    lacking = [key for key in lists if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking:
        raise UserError(f"{path} is not a COCO annotation file: it has no list of {', '.join(lacking)}")
    if annotated and not content["annotations"]:
        raise UserError(f"{path} has no annotations: there is nothing to learn from it")
    return content


def malformed(entry: Any, needed: dict[str, str]) -> str:
    """What an entry of a COCO json lacks; "" where it is well-formed."""
    if not isinstance(entry, dict):
        return f"is no object: {str(entry)[:40]}"
    if lacking := [key for key in needed if key not in entry]:
        return f"has no {', '.join(lacking)}"
    wrong = {key: kind for key, kind in needed.items() if not OF[kind](entry[key])}
    return "; ".join(f"has {key} {json.dumps(entry[key])[:40]}, not {kind}" for key, kind in wrong.items())


def is_id(value: Any) -> bool:
    return isinstance(value, int | str)


OF: dict[str, Callable[[Any], bool]] = {
    "an id": is_id,
    "a word": lambda value: isinstance(value, str) and value != "",
    "a length": lambda value: isinstance(value, int | float) and 0 < value < math.inf,
    "four numbers": lambda value: (
        isinstance(value, list)
        and len(value) == 4
        and all(isinstance(v, int | float) and math.isfinite(v) for v in value)
    ),
}


def is_file(root: Path, name: str, listings: dict[str, set[str]]) -> bool:
    """Whether `root/name` is there; each folder is listed once, which is faster than asking for 100,000 files."""
    folder, base = os.path.split(os.path.join(root, name))
    if folder not in listings:
        listings[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    return base in listings[folder]


def clipped(box: list[float], width: int, height: int) -> list[float]:
    """An XYWH box, cut at the borders of its image."""
    left, top = min(max(box[0], 0), width), min(max(box[1], 0), height)
    right, bottom = min(max(box[0] + box[2], 0), width), min(max(box[1] + box[3], 0), height)
    return [left, top, right - left, bottom - top]


def refuse_broken(key: str, name: str, json_file: str, image_root: str) -> None:
    """The quick check that every training makes of a data set.

    Args:
        key, name: for the message: DATASETS.TRAIN, or DATASETS.TEST, which needs no annotations; the data set's name.
    Raises:
        UserError: what would stop the training, the first three places of it, and the tool that lists and cleans all.
    """
    try:
        report = CocoFile(json_file, image_root, annotated=key != "DATASETS.TEST").check_structure()
    except UserError as error:
        raise UserError(f"{key}: {name}: {error}") from error
    fatal = [summary(kind, report.problems[kind]) for kind in FATAL if kind in report.problems]
    if fatal:
        raise UserError(
            f"{key}: {name}: {fatal[0]}. `tools/check_data.py {json_file} {image_root} --output cleaned.json` lists "
            "everything and writes a json without it"
        )


def coco_paths(name: str) -> tuple[str, str] | None:
    """The json file and image folder of a registered data set; None where it has none, as one of label maps."""
    metadata = MetadataCatalog.get(name)
    found = metadata.get("json_file"), metadata.get("image_root")
    return found if all(found) else None


def label_maps_of(name: str, head: CfgNode) -> LabelMaps:
    """The label maps of a registered data set, for a config's MODEL.SEM_SEG_HEAD."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("json_file") or not metadata.get("image_root"):
        pairs = [(Path(r["file_name"]), Path(r["sem_seg_file_name"])) for r in DatasetCatalog.get(name)]
    else:
        pairs = label_map_pairs(metadata.image_root, metadata.sem_seg_root)
    return LabelMaps(name, pairs, head.NUM_CLASSES, head.IGNORE_VALUE)


def check_coco(splits: list[tuple[str, str]], workers: int = 0) -> tuple[list[CocoFile], DataReport]:
    """Structure and files of several splits, and the images that two of them share.

    Args:
        splits: (json file, image folder) of each.
    Returns:
        Each split with its own report, and the report about all together.
    """
    files = [CocoFile(*split) for split in splits]
    for file in files:
        file.check_structure()
        file.check_files(workers)
    together = DataReport()
    report_shared(together, {str(file.json_file): file.digests for file in files})
    return files, together


def check_label_maps(splits: Sequence[LabelMaps], workers: int = 0) -> DataReport:
    """The files of several splits, each with its own report; returns that of the images that two of them share."""
    for split in splits:
        split.check_files(workers)
    together = DataReport()
    report_shared(together, {split.name: split.digests for split in splits})
    return together
