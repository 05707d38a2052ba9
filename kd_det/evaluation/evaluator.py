"""detectron2's evaluators, by the type of the data set; they say what is wrong with a model or a label map."""

import contextlib
import io
import logging
import os
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
    coco_evaluation,
)
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools.coco import COCO

from kd_core.utils.errors import UserError
from kd_det.compat import evaluating_with
from kd_det.data.label_maps import check_labels

logger = logging.getLogger(__name__)
DETECTIONS = "inference/coco_instances_results.json"  # COCOEvaluator's, in OUTPUT_DIR
KINDS = ("coco", "sem_seg", "cityscapes_sem_seg", "coco_panoptic_seg")


class BoxEvaluator(COCOEvaluator):
    """COCO AP with `faster-coco-eval` where it is installed, else pycocotools; the figures are the same.

    detectron2's own fast implementation is compiled code, which a Python-only detectron2 lacks.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)
        complete(self._coco_api)

    def _eval_predictions(self, predictions: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        if not any(len(p["instances"]) for p in predictions):
            logger.error(
                "NOT ONE DETECTION on %d images: no AP can be computed. Training has diverged, the weights were not "
                "loaded, or SCORE_THRESH_TEST (of MODEL.ROI_HEADS or MODEL.RETINANET) is too high.",
                len(predictions),
            )
        with evaluating_with(coco_eval_class()):
            super()._eval_predictions(predictions, *args, **kwargs)


class CityscapesEvaluator(CityscapesSemSegEvaluator):
    """Cityscapes' own scripts; their mean IoU is also under the name that other evaluators have for it."""

    def evaluate(self) -> dict[str, Any] | None:
        """See detectron2; None but on rank 0."""
        results = super().evaluate()
        if results is not None:
            results["sem_seg"]["mIoU"] = results["sem_seg"]["IoU"]
        return results


class LabelMapEvaluator(SemSegEvaluator):
    """mIoU and pixel accuracy; a label map that does not fit is named before it is counted."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        for item, output in zip(inputs, outputs, strict=True):
            path = self.input_file_to_gt_file[item["file_name"]]
            with PathManager.open(path, "rb") as file:
                labels = np.array(Image.open(file))
            size = tuple(output["sem_seg"].shape[1:])
            if labels.shape != size:
                raise UserError(f"{path} is {labels.shape[1]} × {labels.shape[0]} and its image {size[1]} × {size[0]}")
            check_labels(labels, self._num_classes, self._ignore_label, path)
        super().process(inputs, outputs)


def complete(truth: COCO) -> None:
    """Give annotations what COCOeval reads and training does not need: `iscrowd`, `area`, and ids that are not 0.

    COCOeval takes a match with the id 0 for none.
    """
    annotations = truth.dataset.get("annotations", [])
    for one in annotations:
        one.setdefault("iscrowd", 0)
        one.setdefault("area", one["bbox"][2] * one["bbox"][3])
    if any(not one["id"] for one in annotations):
        for number, one in enumerate(annotations, 1):
            one["id"] = number
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()


def coco_eval_class() -> type:
    """`COCOeval` of faster-coco-eval where it is installed, else that of pycocotools."""
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return coco_evaluation.COCOeval
    return COCOeval_faster


def evaluator_kind(dataset_name: str) -> str:
    """What the metadata of a data set call its evaluator; boxes where they do not say.

    Raises:
        UserError: there is none of this kind, or a package is missing. A training finds it out before it starts.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind not in KINDS:
        raise UserError(
            f"DATASETS.TEST: {dataset_name} needs the evaluator {kind!r}, which tools/train_net.py does not have: "
            "override DistillationTrainer.build_evaluator"
        )
    if kind == "cityscapes_sem_seg" and find_spec("cityscapesscripts") is None:
        raise UserError(
            f"DATASETS.TEST: {dataset_name} is evaluated by Cityscapes' own scripts: pip install cityscapesscripts"
        )
    return kind


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator that the data set's metadata names as `evaluator_type`.

        coco                 box AP, and mask and keypoint AP where the model has such heads
        sem_seg              mIoU and pixel accuracy
        cityscapes_sem_seg   Cityscapes' own scripts
        coco_panoptic_seg    both of the first, and PQ where panopticapi is installed

    Raises:
        UserError: as `evaluator_kind`.
    """
    kind, output = evaluator_kind(dataset_name), os.path.join(cfg.OUTPUT_DIR, "inference")
    if kind == "cityscapes_sem_seg":
        return CityscapesEvaluator(dataset_name)
    boxes = partial(BoxEvaluator, dataset_name, output_dir=output, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if kind == "coco":
        return boxes()
    if kind == "sem_seg":
        return LabelMapEvaluator(dataset_name, output_dir=output)
    evaluators = [LabelMapEvaluator(dataset_name, output_dir=output), boxes()]
    if find_spec("panopticapi") is None:
        logger.warning("%s: PQ is left out, because panopticapi is not installed", dataset_name)
    else:
        evaluators.append(COCOPanopticEvaluator(dataset_name, output))
    return DatasetEvaluators(evaluators)
