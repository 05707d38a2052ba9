"""Which detections are right, which are wrong and which objects are missed, as COCO's evaluation matches them."""

import contextlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.structures import BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

IOU = 0.5
MATCHED = 500  # of a large data set, the first images
XYWH = BoxMode.XYWH_ABS


@dataclass(frozen=True)
class Box:
    """A box in pixels, XYWH, as COCO's files have it.

    Attributes:
        category: its id in the data set.
        score: of a detection; None for ground truth.
        id: of the annotation, for ground truth.
    """

    bbox: tuple[float, float, float, float]
    category: int
    score: float | None = None
    id: int | None = None


@dataclass(frozen=True)
class TestSet:
    """The images and objects of a data set in COCO's format."""

    truth: COCO
    folder: Path

    @property
    def images(self) -> list[int]:
        return sorted(self.truth.imgs)[:MATCHED]

    @property
    def names(self) -> list[str]:
        return [self.truth.cats[number]["name"] for number in sorted(self.truth.cats)]


@dataclass
class Match:
    """One image's detections and objects. Crowds, and detections that match one, are in none of the lists.

    Attributes:
        right: detections that match an object of their class.
        wrong: those that match none: of another class, badly placed, a second box of one object, or nothing there.
        missed: objects without a detection.
        found: ids of the annotations that have one.
    """

    right: list[Box] = field(default_factory=list)
    wrong: list[Box] = field(default_factory=list)
    missed: list[Box] = field(default_factory=list)
    found: set[int] = field(default_factory=set)

    def __str__(self) -> str:
        return f"{len(self.right)} right, {len(self.wrong)} wrong, {len(self.missed)} missed"


def match_detections(truth: COCO, detections: Sequence[dict[str, Any]], images: Iterable[int]) -> dict[int, Match]:
    """Match detections and objects with IoU ≥ .5, the highest score first, in each of `images`.

    A detection is matched the same whether those of lower scores are given or not.

    Args:
        truth: the data set.
        detections: COCO's results: {image_id, category_id, bbox, score}.
    """
    images = list(images)
    matches = {image: Match() for image in images}
    wanted = [dict(found) for found in detections if found["image_id"] in matches]  # loadRes writes into them
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(wanted) if wanted else COCO(), "bbox")
        evaluation.params.iouThrs, evaluation.params.imgIds = [IOU], images
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    for result in filter(None, evaluation.evalImgs):
        match = matches[result["image_id"]]
        matched = set()
        for number, ignored, found in zip(result["gtIds"], result["gtIgnore"], result["gtMatches"][0], strict=True):
            annotation = truth.anns[number]
            if found:
                matched.add(int(found))
            if ignored:
                continue
            if found:
                match.found.add(number)
            else:
                match.missed.append(Box(tuple(annotation["bbox"]), annotation["category_id"], id=number))
        for number, ignored in zip(result["dtIds"], result["dtIgnore"][0], strict=True):
            detection = evaluation.cocoDt.anns[number]
            box = Box(tuple(detection["bbox"]), detection["category_id"], detection["score"])
            if not ignored:
                (match.right if number in matched else match.wrong).append(box)
    return matches


def coco_of_records(records: Sequence[dict[str, Any]], categories: int) -> COCO:
    """detectron2's records as COCO's class holds a data set; categories are their contiguous classes."""
    truth = COCO()
    annotations = [
        {**one, "bbox": BoxMode.convert(one["bbox"], one["bbox_mode"], XYWH), "image_id": record["image_id"]}
        for record in records
        for one in record.get("annotations", [])
    ]
    truth.dataset = {
        "images": [{"id": record["image_id"]} for record in records],
        "annotations": [
            {"iscrowd": 0, "area": one["bbox"][2] * one["bbox"][3], **one, "id": number}
            for number, one in enumerate(annotations, 1)
        ],
        "categories": [{"id": number, "name": str(number)} for number in range(categories)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def coco_detections(image_id: int, found: Instances) -> list[dict[str, Any]]:
    """A model's detections as COCO's results, with contiguous classes."""
    boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
    return [
        {"image_id": image_id, "category_id": category, "bbox": box, "score": score}
        for box, category, score in zip(boxes, found.pred_classes.tolist(), found.scores.tolist(), strict=True)
    ]
