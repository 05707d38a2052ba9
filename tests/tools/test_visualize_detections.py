"""Pictures of ground truth, teacher and student on the built-in digits, without a display."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_det.evaluation.drawing import WRONG, class_colour

PANEL, GAP, TITLE = 2 * 192, 6, 24  # the digits, drawn twice as large


@pytest.fixture
def visualize(load_tool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    return load_tool("visualize_detections")


@pytest.fixture
def distilled(tiny_cfg, save_run, tmp_path: Path) -> Path:
    """OUTPUT_DIR of a tiny student with a tiny teacher."""
    teacher = save_run(tiny_cfg("OUTPUT_DIR", tmp_path / "teacher"), seed=1)
    keys = ("KD.LOSS.NAME", "dkd", "KD.TEACHER.CONFIG_FILE", teacher / "student.yaml")
    return save_run(tiny_cfg(*keys, "KD.TEACHER.WEIGHTS", teacher / "model_final.pth"))


def panels(path: Path, count: int) -> list[np.ndarray]:
    """The images under their titles."""
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (PANEL + TITLE, count * (PANEL + GAP) - GAP, 3)
    return [pixels[TITLE:, i * (PANEL + GAP) :][:, :PANEL] for i in range(count)]


def test_ground_truth_teacher_and_student_stand_side_by_side(visualize, distilled, tmp_path, capsys):
    output = tmp_path / "pictures"
    visualize.main([str(distilled), "--output", str(output), "--images", "2", "--threshold", "0.1", "--num-gpus", "0"])
    assert sorted(path.name for path in output.iterdir()) == ["0000_000000.png", "0001_000001.png"]
    assert "2 pictures" in capsys.readouterr().out
    truth, teacher, student = panels(output / "0000_000000.png", 3)
    shown = {}
    for name, source in {"teacher": tmp_path / "teacher", "student": distilled}.items():
        words = ["--images", "1", "--threshold", "0.1", "--no-teacher", "--num-gpus", "0"]
        visualize.main([str(source / "model_final.pth"), "--output", str(tmp_path / name), *words])
        _, shown[name] = panels(tmp_path / name / "0000_000000.png", 2)
    assert np.array_equal(teacher, shown["teacher"]) and np.array_equal(student, shown["student"])
    assert not np.array_equal(teacher, student) and not np.array_equal(truth, teacher)


def test_above_the_highest_score_every_object_is_missed(visualize, distilled, tmp_path):
    options = ["--images", "1", "--threshold", "0.99999", "--no-teacher", "--num-gpus", "0"]
    visualize.main([str(distilled / "model_final.pth"), "--output", str(tmp_path / "pictures"), *options])
    truth, student = panels(tmp_path / "pictures" / "0000_000000.png", 2)
    assert not (student == WRONG).all(axis=2).any()
    assert any((student == class_colour(place)).all(axis=2).any() for place in range(10))  # dashed
    assert not np.array_equal(truth, student)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dataset", "digit_val"], "DATASETS.TEST: no data set is called 'digit_val'; did you mean digits_val"),
        (["--images", "0"], "--images is 0"),
        (["--threshold", "1.5"], "--threshold is 1.5: a score lies in"),
        (["KD.TEACHER.WEIGHTS", "no.pth"], "KD.TEACHER.WEIGHTS: there is no file no.pth"),
        (["DATASETS.TEST", "()"], "DATASETS.TEST is empty: give --dataset"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(visualize, distilled, tmp_path, options, message):
    with pytest.raises(SystemExit, match=f"^visualize_detections: {message}"):
        visualize.main([str(distilled), "--output", str(tmp_path / "pictures"), "--num-gpus", "0", *options])
    assert not (tmp_path / "pictures").exists()


def test_a_folder_without_a_training_is_named(visualize, tmp_path):
    with pytest.raises(SystemExit, match=r"holds none of model_final.pth: give a training's OUTPUT_DIR"):
        visualize.main([str(tmp_path), "--output", str(tmp_path / "pictures")])
