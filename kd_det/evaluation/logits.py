"""Logits of a run's box head on the objects of its test set, for the report's agreement of teacher and student."""

from pathlib import Path

import torch
from detectron2.structures import Boxes, BoxMode
from torch import Tensor

from kd_core.utils.errors import UserError
from kd_core.utils.report.runs import Run
from kd_det.evaluation.matching import TestSet
from kd_det.evaluation.visualize import Detector
from kd_det.export import read_student
from kd_det.modeling.sigmoid_loss import uses_sigmoid
from kd_det.modeling.teacher.teacher import freeze
from kd_det.modeling.teacher.view import TeacherView

IMAGES = 50  # that have objects, evenly spaced: inference takes time


def objects_of(test_set: TestSet) -> list[tuple[Path, Tensor, Tensor]]:
    """For some images: the file, boxes (N, 4) XYXY in its pixels, and the places (N,) of their classes."""
    truth, places = test_set.truth, {number: place for place, number in enumerate(sorted(test_set.truth.cats))}
    found = []
    for image in test_set.images:
        objects = truth.loadAnns(truth.getAnnIds(imgIds=[image], iscrowd=False))
        path = test_set.folder / truth.imgs[image]["file_name"]
        if objects and path.is_file():
            boxes = BoxMode.convert(torch.tensor([one["bbox"] for one in objects]), BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            found.append((path, boxes, torch.tensor([places[one["category_id"]] for one in objects])))
    return found[:: max(1, -(-len(found) // IMAGES))]


@torch.no_grad()
def logits_on_objects(run: Run, objects: list[tuple[Path, Tensor, Tensor]]) -> Tensor:
    """Logits (N, C) of the box head on ground-truth boxes; of a cascade those of its last stage, of sigmoid classifiers
    without the background's.

    Raises:
        UserError: the run's folder does not hold the weights; they are of a LazyConfig, or of a detector without a box
            head; or there are no objects.
    """
    student = read_student(run.evaluated or run.folder, str(run.folder / "config.yaml"))
    if not hasattr(student.model, "roi_heads"):
        raise UserError(f"{run.title} has no box head")
    if not objects:
        raise UserError("the test set's images have no objects, or are not here")
    detector = Detector(run.title, freeze(student.model), student.config)
    stages = getattr(student.model.roi_heads, "num_cascade_stages", 1)
    logits = []
    for path, boxes, _ in objects:
        item = detector.read(str(path))
        height, width = item["image"].shape[1:]
        scaled = Boxes(boxes.to(torch.float32, copy=True))  # scale() works in place
        scaled.scale(width / item["width"], height / item["height"])
        view = TeacherView(student.model, [item], None)
        logits.append(view.box_logits([[scaled]] * stages)[-1].float())
    found = torch.cat(logits)
    return found[:, :-1] if uses_sigmoid(student.model.roi_heads) else found  # sigmoids do not train the background's
