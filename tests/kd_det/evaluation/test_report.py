"""The figures of finished trainings."""

import json

import pytest
from detectron2.modeling import build_model

from helpers import report_runs
from kd_core.utils.errors import UserError
from kd_det.checkpoint.checkpointer import WholeCheckpointer
from kd_det.config.student import student_config
from kd_det.evaluation import report
from kd_det.evaluation.html_report import read_detector_run


def write_run(folder, ap=31.5):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"iteration": 19, "time": 0.5, "total_loss": 1.0},
        {"iteration": 40, "time": 0.7, "total_loss": 0.9, "bbox/AP": ap, "bbox/AP50": ap, "bbox/AP75": ap},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def finished(tiny_cfg, tmp_path):
    """A folder as a training leaves it: metrics, student.yaml and weights."""
    cfg = tiny_cfg()
    folder = write_run(tmp_path / "output")
    (folder / "student.yaml").write_text(student_config(cfg).dump())
    model = build_model(cfg)
    WholeCheckpointer(model, str(folder)).save("model_final")
    return folder, sum(p.numel() for p in model.parameters())


def test_a_run_is_read_from_its_folder(finished):
    folder, parameters = finished
    run = report.read_run(folder)
    assert (run.ap, run.parameters) == (31.5, parameters)
    assert run.seconds_per_iteration == pytest.approx(0.6)
    assert run.training_seconds == pytest.approx(0.6 * 40)


def test_of_several_test_sets_the_first_is_read(finished, tiny_cfg):
    folder, _ = finished
    (folder / "student.yaml").write_text(student_config(tiny_cfg("DATASETS.TEST", ("second", "first"))).dump())
    values = {f"{name}/bbox/{key}": ap for name, ap in (("first", 10.0), ("second", 20.0)) for key in report.KEYS}
    (folder / "metrics.json").write_text(json.dumps({"iteration": 40, "time": 0.5, **values}) + "\n")
    assert report.read_run(folder).ap == 20.0


def test_the_moving_averages_results_are_not_those_of_another_test_set(finished):
    folder, _ = finished
    values = {f"{group}/{key}": ap for group, ap in (("bbox", 10.0), ("ema/bbox", 20.0)) for key in report.KEYS}
    (folder / "metrics.json").write_text(json.dumps({"iteration": 40, "time": 0.5, **values}) + "\n")
    assert report.read_run(folder).ap == 10.0


def test_a_schedule_that_more_processes_shortened_ends_where_run_json_says(tmp_path):
    info = {"max_iter": 20}
    folder = report_runs.write_run(tmp_path / "run", lines=report_runs.finished_lines(30.0, 20), info=info)
    (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 40}")
    run = read_detector_run(folder)
    assert run.max_iter == 20 and run.is_finished("bbox/AP")


def test_not_one_detection_is_an_ap_of_zero(finished):
    folder, _ = finished
    write_run(folder, ap=float("nan"))
    assert report.read_run(folder).ap == 0.0


def test_a_training_of_two_iterations_which_detectron2_does_not_time_is_finished(finished):
    folder, _ = finished
    lines = [{"iteration": 1, **{f"bbox/{key}": 10.0 for key in report.KEYS}}]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run = report.read_run(folder)
    assert (run.ap, run.training_seconds) == (10.0, 0.0)


def test_an_unfinished_run_is_said_to_be_one(tmp_path):
    with pytest.raises(UserError, match=r"holds no finished training: metrics.json has no bbox/AP"):
        report.read_run(tmp_path)


def test_the_table_gives_one_value_or_mean_and_standard_deviation():
    runs = [report.Run(ap, 50.0, 20.0, 0.25, 90.0, 1_670_000) for ap in (30.0, 32.0)]
    lines = report.table({"teacher": runs[:1], "DKD": runs}).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "teacher", "30.00", "50.00", "20.00", "1.67 M", "0.250", "1 min 30 s",
    ]  # fmt: skip
    assert "31.00 ± 1.41" in lines[3]
