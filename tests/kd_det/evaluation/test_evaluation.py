"""COCO evaluation: which implementation computes it, and what a model that detects nothing is told."""

import logging
import sys
from types import ModuleType

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import coco_evaluation
from pycocotools.cocoeval import COCOeval

from helpers.few_digits import few_digits
from kd_core.utils.errors import UserError
from kd_det.compat import evaluating_with
from kd_det.data import register_datasets
from kd_det.evaluation.evaluator import CityscapesEvaluator, build_evaluator, coco_eval_class
from kd_det.evaluation.figures import MAIN_FIGURES


class Faster(COCOeval):
    """Stands for faster-coco-eval's class, and counts its uses."""

    uses = 0

    def evaluate(self):
        Faster.uses += 1
        return super().evaluate()


@pytest.fixture
def evaluated(tiny_cfg, tmp_path):
    """An evaluator of four images, and the ground truth of the first as a perfect detection."""
    entry = few_digits(tmp_path, 4)
    cfg = tiny_cfg()
    cfg.DATASETS.REGISTER = [entry]
    register_datasets(cfg)
    evaluator = build_evaluator(cfg, entry[0])
    evaluator.reset()
    first = DatasetCatalog.get(entry[0])[0]
    found = [
        {"image_id": first["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in first["annotations"]
    ]
    return evaluator, {"image_id": first["image_id"], "instances": found}


def test_pycocotools_evaluates_where_faster_coco_eval_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    assert coco_eval_class() is COCOeval


def test_faster_coco_eval_evaluates_where_it_is_installed(evaluated, monkeypatch):
    package = ModuleType("faster_coco_eval")
    package.COCOeval_faster = Faster
    monkeypatch.setitem(sys.modules, "faster_coco_eval", package)
    evaluator, prediction = evaluated
    evaluator._predictions = [prediction]
    Faster.uses = 0
    assert evaluator.evaluate()["bbox"]["AP"] > 0
    assert Faster.uses == 1 and coco_evaluation.COCOeval is COCOeval


def test_detectron2s_own_class_is_put_back_after_an_error():
    with pytest.raises(KeyError), evaluating_with(Faster):
        assert coco_evaluation.COCOeval is Faster
        raise KeyError
    assert coco_evaluation.COCOeval is COCOeval


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lvis", r"DATASETS\.TEST: one_of_ours needs the evaluator 'lvis', which tools/train_net\.py does not have"),
        ("cityscapes_sem_seg", r"one_of_ours is evaluated by Cityscapes' own scripts: pip install cityscapesscripts"),
    ],
)
def test_data_that_cannot_be_evaluated_are_refused_by_name(kind, message, tiny_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "cityscapesscripts", None)  # as if it were not installed
    MetadataCatalog.get("one_of_ours").evaluator_type = kind
    try:
        with pytest.raises(UserError, match=message):
            build_evaluator(tiny_cfg(), "one_of_ours")
    finally:
        MetadataCatalog.pop("one_of_ours")


def test_keypoint_sigmas_of_the_config_reach_the_evaluator(tiny_cfg, tmp_path):
    entry = few_digits(tmp_path, 1)
    cfg = tiny_cfg("TEST.KEYPOINT_OKS_SIGMAS", [0.1, 0.2])
    cfg.DATASETS.REGISTER = [entry]
    register_datasets(cfg)
    assert build_evaluator(cfg, entry[0])._kpt_oks_sigmas == [0.1, 0.2]


def test_cityscapes_has_the_figure_by_which_segmentors_are_compared(monkeypatch):
    """Its scripts need the whole data set: this is what they hand back."""
    found = {"sem_seg": {"IoU": 70.0, "iIoU": 50.0}}
    monkeypatch.setattr("detectron2.evaluation.CityscapesSemSegEvaluator.evaluate", lambda _: found)
    results = object.__new__(CityscapesEvaluator).evaluate()
    assert results["sem_seg"][MAIN_FIGURES["sem_seg"]] == 70.0


def test_a_model_that_detects_nothing_is_told_so_loudly(evaluated, caplog):
    evaluator, prediction = evaluated
    evaluator._predictions = [{**prediction, "instances": []}]
    with caplog.at_level(logging.ERROR, logger="kd_det"):
        evaluator.evaluate()
    assert "NOT ONE DETECTION on 1 images" in caplog.text and "SCORE_THRESH_TEST" in caplog.text
