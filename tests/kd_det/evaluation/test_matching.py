"""Right, wrong and missed are what COCO's own evaluation says they are."""

import contextlib
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.evaluation.drawing import WRONG, Canvas, class_colour
from kd_det.evaluation.matching import Box, Match, coco_detections, coco_of_records, match_detections


def quietly(call, *args):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args)


def pycocotools_own(truth: COCO, detections: list[dict]) -> Counter:
    """Counts of right, wrong and missed straight from pycocotools' defaults at IoU .5, all sizes, 100 detections."""
    evaluation = COCOeval(truth, quietly(truth.loadRes, [dict(found) for found in detections]), "bbox")
    quietly(evaluation.evaluate)
    counts = Counter()
    for result in evaluation.evalImgs:
        if result is not None and result["aRng"] == evaluation.params.areaRng[0]:
            counted = ~result["dtIgnore"][0].astype(bool)
            counts["right"] += int((result["dtMatches"][0][counted] > 0).sum())
            counts["wrong"] += int((result["dtMatches"][0][counted] == 0).sum())
            objects = ~np.array(result["gtIgnore"], dtype=bool)
            counts["missed"] += int((result["gtMatches"][0][objects] == 0).sum())
    return counts


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_counts_are_pycocotools_own_on_real_detections(shared_dir: Path, threshold: float):
    folder = shared_dir / "data" / "det-eval-fixtures" / "coco_val2014_100"
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}")
    truth = quietly(COCO, str(folder / "gts" / "sampled_gts_bbox_area.json"))
    detections = json.loads((folder / "cocoapi_results.json").read_text())
    detections = [found for found in detections if found["score"] > threshold]
    matches = match_detections(truth, detections, truth.getImgIds())
    own = {name: sum(len(getattr(match, name)) for match in matches.values()) for name in ("right", "wrong", "missed")}
    assert own == pycocotools_own(truth, detections) and min(own.values()) > 20


def record(*objects: tuple[int, list[float], int]) -> dict:
    """A record of detectron2's with objects (class, XYXY, crowd)."""
    annotations = [
        {"category_id": category, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "iscrowd": crowd}
        for category, box, crowd in objects
    ]
    return {"image_id": 7, "annotations": annotations}


def detected(*found: tuple[int, list[float], float]) -> list[dict]:
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([box for _, box, _ in found]).reshape(-1, 4))
    instances.pred_classes = torch.tensor([category for category, _, _ in found])
    instances.scores = torch.tensor([score for _, _, score in found])
    return coco_detections(7, instances)


def match(objects: list, found: list) -> Match:
    return match_detections(coco_of_records([record(*objects)], 3), detected(*found), [7])[7]


OBJECT = (1, [10.0, 10.0, 30.0, 30.0], 0)


@pytest.mark.parametrize(
    ("objects", "found", "counts"),
    [
        ([OBJECT], [(1, [10.0, 10.0, 30.0, 29.0], 0.9)], "1 right, 0 wrong, 0 missed"),
        ([OBJECT], [(2, [10.0, 10.0, 30.0, 30.0], 0.9)], "0 right, 1 wrong, 1 missed"),
        ([OBJECT], [(1, [20.0, 20.0, 40.0, 40.0], 0.9)], "0 right, 1 wrong, 1 missed"),
        ([OBJECT], [(1, [10.0, 10.0, 30.0, 28.0], 0.6), (1, OBJECT[1], 0.9)], "1 right, 1 wrong, 0 missed"),
        ([(1, [0.0, 0.0, 90.0, 90.0], 1)], [(1, [10.0, 10.0, 30.0, 30.0], 0.9)], "0 right, 0 wrong, 0 missed"),
        ([OBJECT], [], "0 right, 0 wrong, 1 missed"),
        ([], [], "0 right, 0 wrong, 0 missed"),
    ],
    ids=["right", "another class", "badly placed", "second box", "crowd", "nothing detected", "empty image"],
)
def test_a_box_is_right_wrong_or_missed(objects, found, counts):
    assert str(match(objects, found)) == counts


def test_the_highest_score_has_the_first_choice():
    boxes = [(1, [10.0, 10.0, 30.0, 30.0], 0.6), (1, [10.0, 10.0, 30.0, 28.0], 0.9)]
    assert match([OBJECT], boxes).right[0].score == pytest.approx(0.9)


def pixels(drawn: Match, colour: tuple[int, int, int]) -> int:
    """Pixels of `colour` below the label."""
    canvas = Canvas(np.full((420, 420, 3), 128, dtype=np.uint8), ["a", "b", "c"])
    return int((np.asarray(canvas.draw_match(drawn))[150:] == colour).all(axis=2).sum())


def test_right_is_solid_missed_is_dashed_in_the_colour_of_the_class_and_wrong_has_its_own():
    box = Box((100.0, 100.0, 200.0, 200.0), 1, 0.9)
    colour = class_colour(1)
    right, missed, wrong = Match(right=[box]), Match(missed=[box]), Match(wrong=[box])
    assert pixels(right, colour) > 1.3 * pixels(missed, colour) > 0
    assert pixels(right, WRONG) == pixels(missed, WRONG) == 0 < pixels(wrong, WRONG)


def test_the_first_24_classes_have_different_colours_none_of_them_that_of_what_is_wrong():
    colours = {class_colour(index) for index in range(24)}
    assert len(colours) == 24 and WRONG not in colours and class_colour(3) == class_colour(27)
