"""The evaluator that training uses, on real detections whose COCO summary is known from the official implementation."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools.coco import COCO

from kd_det.evaluation.evaluator import build_evaluator, coco_eval_class

NAME = "coco_val2014_100"
# the evaluator's name of a metric → expected.json's
METRICS = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "APsmall", "APm": "APmedium", "APl": "APlarge"}


@pytest.fixture
def fixtures(shared_dir: Path) -> Path:
    folder = shared_dir / "data" / "det-eval-fixtures" / NAME
    if not folder.is_dir():
        pytest.skip(f"no fixtures at {folder}")
    register_coco_instances(NAME, {}, str(folder / "gts" / "sampled_gts_bbox_area.json"), str(folder))
    yield folder
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


@pytest.fixture
def evaluator(fixtures: Path, tmp_path: Path) -> COCOEvaluator:
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluator = build_evaluator(cfg, NAME)
    evaluator.reset()
    return evaluator


def read(fixtures: Path) -> tuple[dict[str, float], dict[int, list[dict]]]:
    """The known figures, and the detections of each image with detectron2's contiguous classes."""
    expected = json.loads((fixtures / "expected.json").read_text())
    DatasetCatalog.get(NAME)  # fills the metadata
    contiguous = MetadataCatalog.get(NAME).thing_dataset_id_to_contiguous_id
    detections = defaultdict(list)
    for found in json.loads((fixtures / "cocoapi_results.json").read_text()):
        detections[found["image_id"]].append({**found, "category_id": contiguous[found["category_id"]]})
    assert sum(map(len, detections.values())) == 734
    return {name: expected[key] for name, key in METRICS.items()}, detections


def as_instances(record: dict, detections: list[dict]) -> Instances:
    """Detections as a model gives them."""
    boxes = torch.tensor([found["bbox"] for found in detections], dtype=torch.float64).reshape(-1, 4)
    instances = Instances((record["height"], record["width"]))
    instances.pred_boxes = Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS))
    instances.scores = torch.tensor([found["score"] for found in detections], dtype=torch.float64)
    instances.pred_classes = torch.tensor([found["category_id"] for found in detections], dtype=torch.int64)
    return instances


def test_the_evaluator_gives_the_known_ap_to_six_decimals(fixtures: Path, evaluator: COCOEvaluator):
    expected, detections = read(fixtures)
    # where process() puts them, but in the file's decimals; its own float32 corners are the next test's
    evaluator._predictions = [{"image_id": image_id, "instances": found} for image_id, found in detections.items()]
    result = evaluator.evaluate()["bbox"]
    assert {name: round(result[name] / 100, 6) for name in METRICS} == expected


def test_a_models_float32_boxes_cost_no_more_than_two_ties(fixtures: Path, evaluator: COCOEvaluator):
    """Two detections overlap the truth by exactly .6 and .8, which are thresholds: rounded corners may fall short."""
    expected, detections = read(fixtures)
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [{"instances": as_instances(record, detections[record["image_id"]])}])
    result = evaluator.evaluate()["bbox"]
    for name in ("AP50", "AP75"):  # thresholds without a tie
        assert round(result[name] / 100, 6) == expected[name]
    assert result["AP"] / 100 == pytest.approx(expected["AP"], abs=1e-3)


def test_the_implementation_chosen_gives_all_twelve_known_figures(fixtures: Path):
    expected = json.loads((fixtures / "expected.json").read_text())
    truth = COCO(str(fixtures / "gts" / "sampled_gts_bbox_area.json"))
    evaluation = coco_eval_class()(truth, truth.loadRes(str(fixtures / "cocoapi_results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    figures = [value for key, value in expected.items() if key != "source"]
    assert [round(float(value), 6) for value in evaluation.stats[:12]] == figures


def test_annotations_without_what_training_does_not_need_and_with_the_id_0_are_evaluated(tmp_path: Path):
    """The truth as detections has an AP of 100; COCOeval takes a match with the id 0 for none."""
    boxes = [[5, 5, 20, 20], [40, 8, 15, 30], [10, 60, 50, 12]]
    annotations = [{"id": i, "image_id": 1, "category_id": 3, "bbox": box} for i, box in enumerate(boxes)]
    image = {"id": 1, "file_name": "1.jpg", "height": 100, "width": 100}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 3, "name": "thing"}]}
    path, name = tmp_path / "truth.json", f"plain_{tmp_path.name}"
    path.write_text(json.dumps(content))
    register_coco_instances(name, {}, str(path), str(tmp_path))
    record = DatasetCatalog.get(name)[0]
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluator = build_evaluator(cfg, name)
    evaluator.reset()
    detections = [{"bbox": box, "category_id": 0, "score": 0.9} for box in boxes]
    evaluator.process([record], [{"instances": as_instances(record, detections)}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)
