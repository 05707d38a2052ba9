"""The page about classifiers: by class, confusions, calibration, agreement with the teacher."""

import json
import re
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.report_runs import Page
from kd_cls.data.build import build_data
from kd_cls.evaluate import evaluate_checkpoint
from kd_cls.report import CURVES, Predictions, classifier_page, predict, read_classifier_run
from kd_cls.train import train
from kd_core import losses
from kd_core.utils.report.runs import Run, assign_roles, by_title


@pytest.fixture
def runs(tiny, teacher_yaml, tmp_path, process):
    """Folders of a teacher, a plain and a distilled run of 8 iterations."""
    train(tiny("OUTPUT_DIR", tmp_path / "plain"), process)
    train(tiny("OUTPUT_DIR", tmp_path / "dkd", "KD.LOSS.NAME", "dkd", "SOLVER.EVAL_PERIOD", 1), process)
    return teacher_yaml.parent / "output", tmp_path / "plain", tmp_path / "dkd"


def test_the_page_of_three_runs_has_every_section_and_the_numbers_of_metrics_json(runs):
    page = Page(classifier_page(assign_roles(map(read_classifier_run, runs)), "three runs").render())
    assert page.rows[0] == ["", "teacher", "plain", "DKD"]
    for key in ("val/top1", "val/top5", "val/loss"):
        for folder in runs:
            lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
            expected = [line[key] for line in lines if key in line][-1]
            assert {value for value, _ in page.numbers[key, str(folder)]} == {expected}
    gflops = {row[0]: row[1:] for row in page.rows if row}["GFLOPs (multiply-adds of an image)"]
    assert gflops[1] == gflops[2] and all(float(value) > 0 for value in gflops)
    for words in ("By class", "Confusions of ", "expected calibration error", "Logits of teacher and ", "nckd"):
        assert words in page.text
    assert all(address.startswith(("data:", "#")) for address in page.addresses)


def test_every_term_of_every_loss_has_a_curve():
    kinds = [getattr(losses, name) for name in losses.__all__ if name.endswith("Loss")]
    terms = {"task"}.union(*(kind.terms for kind in kinds))
    assert terms > {"mass", "class", "cross_tckd", "inter", "review"}
    assert [term for term in terms if not re.fullmatch(CURVES["Losses"], term)] == []


def test_the_predictions_are_those_that_the_evaluation_counts(runs, tiny, process):
    metrics = evaluate_checkpoint(tiny("OUTPUT_DIR", runs[1]), process)
    found = predict(read_classifier_run(runs[1]))
    assert 100 * float(found.right.double().mean()) == pytest.approx(metrics["top1"])
    assert len(found.target) == metrics["images"] == found.confusions().sum() and len(found.names) == 10


def test_of_many_images_evenly_spaced_ones_are_predicted(runs, tiny, process, monkeypatch):
    monkeypatch.setattr("kd_cls.report.IMAGES", 11)
    assert torch.equal(predict(read_classifier_run(runs[1])).target, torch.tensor([
        build_data(tiny("DATA.VAL_IMAGES", 11)).val[index][1] for index in range(11)
    ]))  # fmt: skip


def test_a_run_without_weights_is_said_to_have_none(runs):
    (runs[1] / "best.pth").unlink()
    page = Page(classifier_page(assign_roles([read_classifier_run(runs[1])]), "plain").render())
    assert "plain: no predictions: there is no" in page.text and "No teacher is among the runs" in page.text


def test_confusions_and_accuracy_by_class_are_counted():
    logits = torch.eye(3)[[0, 0, 1, 2, 1]] * 9
    found = Predictions(logits, torch.tensor([0, 0, 1, 1, 1]), ["a", "b", "c"])
    assert found.confusions().tolist() == [[2, 0, 0], [0, 2, 1], [0, 0, 0]]
    assert found.by_class(1)[:2] == pytest.approx([100, 200 / 3]) and found.by_class(1)[2] != found.by_class(1)[2]


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence = 0.9
    logits = torch.log(torch.tensor([[confidence, 1 - confidence]])).repeat(10, 1)
    found = Predictions(logits, torch.tensor([0] * 6 + [1] * 4), ["a", "b"])
    (mean,), (accuracy,), error = found.calibration()
    assert (mean, accuracy, error) == pytest.approx((0.9, 0.6, 30.0))


def test_a_training_leaves_its_page_its_origin_and_a_status_line(tiny, tmp_path, process):
    train(tiny("REPORT.ENABLED", True, "SOLVER.EVAL_PERIOD", 1), process)
    page = Page((tmp_path / "run" / "report.html").read_text())
    assert "No teacher is among the runs" in page.text and "training time" in page.text
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["max_iter"] == 8 and info["training_seconds"] > 0
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [event.step for event in events.Images("val/confusions")] == [4, 8]
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert "Status: at iteration 4 of 8 (50 %), top-1" in "\n".join(lines)
    assert "Status: finished, iteration 8 of 8 (100 %), top-1" in lines[-1]


@pytest.mark.parametrize(
    ("folders", "titles"),
    [
        (["a/seed_0", "a/seed_1", "b/seed_0", "b/seed_1"], ["DKD [a/seed_0]", "DKD [b/seed_0]"]),
        (["out/a", "out/a_1", "out/b", "out/b_1"], ["DKD [a]", "DKD [b]"]),
        (["out", "out", "out", "out"], ["DKD [out 1]", "DKD [out 2]"]),
    ],
    ids=["equal names", "other names", "equal paths"],
)
def test_methods_that_differ_in_more_than_the_seed_are_never_one_row(folders: list[str], titles: list[str]) -> None:
    betas = (8.0, 8.0, 2.0, 2.0)
    runs = [
        Run(Path(folder), {"SEED": i % 2, "KD": {"LOSS": {"NAME": "dkd", "DKD": {"BETA": beta}}}}, [])
        for i, (folder, beta) in enumerate(zip(folders, betas, strict=True))
    ]
    grouped = by_title(assign_roles(runs))
    assert list(grouped) == titles and [len(group) for group in grouped.values()] == [2, 2]
