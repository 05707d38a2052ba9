"""tools/run_cls_table.py: all methods, what is finished is not repeated, and the numbers are those of the runs."""

import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "run_cls_table.py"
SHORT = ["SOLVER.EPOCHS", "0.2", "DATA.TRAIN_IMAGES", "60", "DATA.VAL_IMAGES", "40", "SOLVER.IMS_PER_BATCH", "12"]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_cls_table", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_of_the_runs_and_a_second_call_repeats_none(
    tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TOOL.parents[1])
    words = ["--methods", "baseline", "dkd", "deepkd", "--seeds", "1", "2", "--output", str(tmp_path), *SHORT]
    table = tool.main(words)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()[2:]
    }
    assert list(rows) == ["teacher", "plain", "DKD", "DeepKD (DKD)"]
    assert rows["teacher"][0] == "272 k" and rows["DKD"][0] == "78 k"
    found = [last_evaluation(tmp_path / "cls_dkd" / f"seed_{seed}") for seed in (1, 2)]
    assert rows["DKD"][1].startswith(f"{sum(found) / 2:.2f} ± ")
    assert (tmp_path / "cls_table.md").read_text().strip() == table
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.pth")}
    assert len(written) == 7 and tool.main(words) == table
    assert written == {path: path.stat().st_mtime_ns for path in written}


def last_evaluation(folder: Path) -> float:
    return json.loads((folder / "metrics.json").read_text().splitlines()[-1])["val/top1"]
