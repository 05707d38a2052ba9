"""tools/profile_step.py on a step of either world: every part has a time, and together they are the step."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from helpers.tiny_detector import write_training
from kd_core.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "0"]
RANDOM = ["KD.TEACHER.ALLOW_RANDOM", "True", "KD.TEACHER.WEIGHTS", ""]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("profile_step", ROOT / "tools" / "profile_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def milliseconds(table: str) -> dict[str, float]:
    """The parts of a printed table."""
    return {cells[1].strip(): float(cells[2]) for cells in (line.split("|") for line in table.splitlines()[2:])}


def test_a_detection_step_is_split_into_student_teacher_and_loss(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    trace = tmp_path / "new" / "trace.json"
    words = ["configs/Digits/dkd.yaml", "--steps", "1", "--trace", str(trace), *SMALL, *RANDOM]
    parts = milliseconds(tool.main(words))
    assert {"student backbone", "teacher backbone", "teacher box_head", "distillation loss"} < set(parts)
    assert parts["teacher backbone"] > 0 and parts["optimizer step"] > 0
    assert sum(parts.values()) == pytest.approx(2 * parts["step"], rel=1e-2)
    assert any("teacher backbone" in event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"])


@pytest.mark.parametrize(
    ("architecture", "head", "teachers_head"),
    [("retinanet", "student head", "cls_subnet"), ("segmentation", "student sem_seg_head", "predictor")],
)
def test_a_step_without_roi_heads_and_with_two_teachers_is_too(
    tool: ModuleType, tmp_path: Path, architecture: str, head: str, teachers_head: str
) -> None:
    config = write_training(tmp_path, architecture, "KD.LOSS.NAME", "dkd", "OUTPUT_DIR", tmp_path / "output")
    taught = [str(tmp_path / "teacher.yaml"), ""]
    words = ["--steps", "1", "--trace", str(tmp_path / "trace.json"), *SMALL, "SOLVER.ACCUMULATE_STEPS", "1"]
    two = ["KD.TEACHER.CONFIG_FILE", "", "KD.TEACHERS", str([taught, taught])]
    parts = milliseconds(tool.main([str(config), *words, *two]))
    teachers = {f"teacher {index} {name}" for index in range(2) for name in ("backbone", teachers_head)}
    assert {"student backbone", head, *teachers} <= set(parts)


def test_a_classification_step_is_too(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["configs/Digits/cls_baseline.yaml", "--steps", "1", "--trace", str(tmp_path / "trace.json")]
    parts = milliseconds(tool.main([*words, "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]))
    assert {"student", "task loss", "optimizer step"} < set(parts) and "teacher" not in parts
    assert parts["student"] > 0
    feature = ["configs/Digits/cls_reviewkd.yaml", *words[1:], "KD.LOSS.NAME", "none"]
    parts = milliseconds(tool.main([*feature, "DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), *RANDOM[:2]]))
    assert parts["step"] > 0 and "distillation loss" not in parts


def test_a_config_that_is_not_there_is_named(tool: ModuleType) -> None:
    with pytest.raises(UserError, match=r"there is no file configs/none.yaml"):
        tool.main(["configs/none.yaml"])
