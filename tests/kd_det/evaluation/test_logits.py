"""Logits of a run on the objects of its test set, and the sections that are made of them."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from helpers.few_digits import few_digits
from helpers.tiny_detector import RETINANET
from kd_core.utils.report.runs import Run
from kd_det.checkpoint.checkpointer import WholeCheckpointer
from kd_det.config.student import student_config, write_student
from kd_det.evaluation.evaluator import DETECTIONS
from kd_det.evaluation.logits import logits_on_objects, objects_of
from kd_det.evaluation.pictures import detection_sections, open_test_set
from kd_det.evaluation.visualize import Detector

SMALL = ("INPUT.MIN_SIZE_TEST", 64)


@pytest.fixture
def run(tiny_cfg, tmp_path):
    """`run(name, seed, *overrides)`: an OUTPUT_DIR with random weights and a detection, as a training of that seed
    leaves it."""

    def make(name: str, seed: int, *overrides: object) -> Run:
        entry = few_digits(tmp_path, 3)
        data = ("DATASETS.REGISTER", [entry], "DATASETS.TEST", f"('{entry[0]}',)")
        cfg = tiny_cfg(*SMALL, "OUTPUT_DIR", tmp_path / name, *data, *overrides)
        (tmp_path / name / DETECTIONS).parent.mkdir(parents=True)
        torch.manual_seed(seed)
        write_student(student_config(cfg), tmp_path / name / "student.yaml")
        (tmp_path / name / "config.yaml").write_text(cfg.dump())
        WholeCheckpointer(build_model(cfg), cfg.OUTPUT_DIR).save("model_final")
        truth = json.loads(Path(entry[1]).read_text())["annotations"][0]
        found = {key: truth[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
        (tmp_path / name / DETECTIONS).write_text(json.dumps([found] if seed else []))
        config = {"DATASETS": {"TEST": [entry[0]], "REGISTER": [entry]}}
        return Run(tmp_path / name, config, [], title=name, role="student" if seed else "teacher")

    return make


def test_logits_on_objects_are_those_of_detectron2s_box_head(run, tiny_cfg):
    one = run("student", 1)
    objects = objects_of(open_test_set(one))
    logits = logits_on_objects(one, objects)
    assert len(logits) == sum(len(classes) for *_, classes in objects) > 3 and logits.shape[1] == 11
    model = build_model(student_config(tiny_cfg(*SMALL))).eval()
    WholeCheckpointer(model, save_to_disk=False).load(str(one.folder / "model_final.pth"))
    heads, expected = model.roi_heads, []
    for path, boxes, _ in objects:
        item = Detector("", model, student_config(tiny_cfg(*SMALL))).read(str(path))
        small = Boxes(boxes.float() / 3)  # 192 px at 64
        with torch.no_grad():
            features = model.backbone(model.preprocess_image([item]).tensor)
            pooled = heads.box_pooler([features[name] for name in heads.box_in_features], [small])
            expected.append(heads.box_predictor(heads.box_head(pooled))[0])
    assert torch.allclose(logits, torch.cat(expected), atol=1e-5) and logits.std() > 1e-3


def test_teacher_and_student_agree_by_class_in_what_they_find_and_in_their_logits(run):
    groups = {"teacher": [run("teacher", 0)], "DKD": [run("DKD", 1)]}
    pictures, agreement = detection_sections(groups, "DKD", logits=True)
    found, logits = agreement.blocks
    assert sum(cells[4][0].value for _, cells in found.rows) == 1  # the student alone finds one object
    assert sum(cells[0][0].value for _, cells in logits.rows) == sum(cells[1][0].value for _, cells in found.rows)
    assert pictures.blocks[1].wide and len(pictures.blocks[1].figures) == 2


def test_boxes_of_floats_serve_every_run_as_they_are(run):
    one = run("student", 1)
    objects = [(path, boxes.float(), classes) for path, boxes, classes in objects_of(open_test_set(one))]
    before = [boxes.clone() for _, boxes, _ in objects]
    first = logits_on_objects(one, objects)
    assert all(torch.equal(boxes, old) for (_, boxes, _), old in zip(objects, before, strict=True))
    assert torch.equal(logits_on_objects(one, objects), first)


def test_a_run_that_was_evaluated_on_other_images_is_left_out_and_named(run):
    groups = {"teacher": [run("teacher", 0)], "DKD": [run("DKD", 1)]}
    groups["teacher"][0].config["DATASETS"] = {"TEST": ["digits_val"], "REGISTER": []}
    (pictures,) = detection_sections(groups, "DKD", logits=True)
    assert pictures.text[0] == "teacher: it was evaluated on other images, digits_val."
    assert pictures.blocks[0].header[1:] == ["DKD"]


def test_a_json_without_what_only_the_evaluation_reads_has_pictures(run):
    one = run("DKD", 1)
    path = Path(one.config["DATASETS"]["REGISTER"][0][1])
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation.pop("iscrowd"), annotation.pop("area")
    path.write_text(json.dumps(content))
    assert len(detection_sections({"DKD": [one]}, "DKD", logits=False)[0].blocks) > 1


def test_a_one_stage_detector_is_drawn_and_the_page_says_why_no_logits_are_compared(run):
    groups = {"teacher": [run("teacher", 0, *RETINANET)], "KD": [run("KD", 1, *RETINANET)]}
    pictures, agreement = detection_sections(groups, "KD", logits=True)
    assert len(pictures.blocks[1].figures) == 2
    assert agreement.text == ["The logits are not compared: teacher has no box head"]


def test_without_weights_the_page_says_why_no_logits_are_compared(run):
    groups = {"teacher": [run("teacher", 0)], "DKD": [run("DKD", 1)]}
    (groups["teacher"][0].folder / "model_final.pth").unlink()
    (groups["teacher"][0].folder / "last_checkpoint").unlink(missing_ok=True)
    agreement = detection_sections(groups, "DKD", logits=True)[1]
    assert len(agreement.blocks) == 1 and "The logits are not compared: " in agreement.text[0]
