"""COCO evaluation: detectron2's evaluator, with an error in the log when a model detects nothing."""

import logging
import os
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, coco_evaluation

from kd_core.utils.errors import UserError
from kd_det.compat import evaluating_with

logger = logging.getLogger(__name__)


class BoxEvaluator(COCOEvaluator):
    """COCO AP with `faster-coco-eval` where it is installed, else pycocotools; the figures are the same.

    detectron2's own fast implementation is compiled code, which a Python-only detectron2 lacks.
    """

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        super().__init__(dataset_name, use_fast_impl=False, **kwargs)

    def _eval_predictions(self, predictions: list[dict[str, Any]], *args: Any, **kwargs: Any) -> None:
        if not any(len(p["instances"]) for p in predictions):
            logger.error(
                "NOT ONE DETECTION on %d images: no AP can be computed. Training has diverged, the weights were not "
                "loaded, or SCORE_THRESH_TEST (of MODEL.ROI_HEADS or MODEL.RETINANET) is too high.",
                len(predictions),
            )
        with evaluating_with(coco_eval_class()):
            super()._eval_predictions(predictions, *args, **kwargs)


def coco_eval_class() -> type:
    """`COCOeval` of faster-coco-eval where it is installed, else that of pycocotools."""
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        return coco_evaluation.COCOeval
    return COCOeval_faster


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """The evaluator of a data set whose metadata says `evaluator_type: coco`.

    Raises:
        UserError: the data set has another type.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
    if kind != "coco":
        raise UserError(
            f"DATASETS.TEST: {dataset_name} needs the evaluator {kind!r}, but tools/train_net.py evaluates COCO-format "
            "data sets only: override DistillationTrainer.build_evaluator for others"
        )
    return BoxEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
