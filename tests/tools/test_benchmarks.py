"""What the benchmarks conclude from their figures: slopes, the report, the exit code."""

import importlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import detection_utils
from detectron2.utils.events import EventStorage
from torch import nn

from kd_core.losses import DKDLoss

ROOT = Path(__file__).resolve().parents[2]
Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load("growth")`: benchmarks/growth.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


# Figures ------------------------------------------------------------------------------------------------------------


def test_figures_are_written_whole_with_machine_command_and_bounds(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = load("figures")
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks/a.py"), "--peer", "/home/me/code", "--json", "/x/a.json"])
    path = tmp_path / "new" / "a.json"
    bounds = [figures.Bound("ratio", 0.5, 1.0)]
    assert figures.write_figures(path, {"t": figures.Table(["", "ms"], [["a", 1.0]])}, bounds, more=[1]) == 0
    content = json.loads(path.read_text())
    assert content["machine"]["torch"].startswith(torch.__version__.split("+")[0]) and content["more"] == [1]
    assert content["command"] == "python benchmarks/a.py --peer …/code"
    assert content["bounds"] == [{"name": "ratio", "found": 0.5, "bound": 1.0}]
    assert str(figures.Table(**content["tables"]["t"])).splitlines()[-1].split() == ["|", "a", "|", "1.00", "|"]
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


def test_what_is_measured_by_hand_is_kept_apart_from_the_figures_of_the_page(load: Load) -> None:
    path = load("figures").options("", "core").parse_args([]).json
    assert path.name == "core.json" and path.parent.parent == load("run").OUTPUT


def test_a_missed_bound_or_a_nan_is_the_exit_code(load: Load, tmp_path: Path) -> None:
    figures = load("figures")
    for found, code in ((1.0, 0), (1.001, 1), (math.nan, 1)):
        assert figures.write_figures(tmp_path / "a.json", {}, [figures.Bound("x", found, 1.0)]) == code


def test_a_steps_report_keeps_ratios_and_judges_those_with_a_bound(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [["KD / floor", 11.0, 10.0, 1.1, 1.05], ["KD / plain", 30.0, 10.0, 3.0, None]]
    figures = load("figures")
    parts = figures.parts_of_step([0.011, 0.012, 0.001], {"teacher": [0.002], "student": [0.004, 0.005, 0.006]})
    assert [row[0] for row in parts.rows] == ["teacher", "student", "the rest", "the whole step"]
    assert [row[1] for row in parts.rows] == pytest.approx([2.0, 5.0, 4.0, 11.0]) and parts.rows[2][2] == "36.4%"
    assert figures.report_steps({"KD": [0.011, 0.012, 0.001]}, rows, tmp_path / "a.json", parts) == 1
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["milliseconds"] == {"KD": 11.0} and [bound["found"] for bound in content["bounds"]] == [1.1]
    assert "1.10 (≤ 1.05) **above**" in capsys.readouterr().out


# Growth -------------------------------------------------------------------------------------------------------------


def test_the_slope_is_that_of_the_last_decade_alone(load: Load) -> None:
    last_slope, sizes = load("growth").last_slope, [1, 10, 100, 300, 1000]
    assert last_slope(sizes, [50.0, 50.0, 1.0, 3.0, 10.0]) == pytest.approx(1)
    assert last_slope(sizes, [float(n**2) for n in sizes]) == pytest.approx(2)
    assert last_slope(sizes, [7.0] * 5) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"sizes \[1, 100\] have fewer than two within a decade"):
        last_slope([1, 100], [1.0, 2.0])


def test_growth_faster_than_linear_misses_its_bound_in_time_and_in_memory(load: Load) -> None:
    growth, sizes = load("growth"), [1000, 10_000]
    curve = growth.Curve("KD", "classes", sizes, seconds=[1.0, 10 * math.log(10_000) / math.log(1000)], bytes=[1, 12])
    assert [bound.holds for bound in growth.bounds(curve)] == [True, False]  # n log n passes, 12 × the memory does not
    curve = growth.Curve("KD", "classes", sizes, seconds=[1.0, 15.0], bytes=[1, 10])
    assert [bound.holds for bound in growth.bounds(curve)] == [False, True]


def test_parameters_are_exactly_as_many_as_asked_for_in_a_networks_shapes(load: Load) -> None:
    params = load("growth").realistic_parameters(200_001, "cpu")
    assert sum(p.numel() for p in params) == 200_001 and params[0].shape == (64, 3, 7, 7) and len(params) > 10


def test_curves_and_plot_come_from_real_steps(load: Load, tmp_path: Path) -> None:
    growth = load("growth")
    curves = [*growth.loss_curves("rows", (4, 8), 1, "cpu"), growth.optimizer_curve((1000, 5000), 1, "cpu")]
    assert [curve.name for curve in curves] == [*growth.LOSSES, "StreamSGD, 2 sets"]
    assert all(seconds > 0 for curve in curves for seconds in curve.seconds)
    optimizer = curves[-1]
    assert optimizer.bytes == pytest.approx([20 * n for n in optimizer.sizes], rel=0.1)  # 2 gradients, sum, 2 buffers
    growth.plot([vars(curve) for curve in curves], tmp_path / "figures" / "growth.png")
    assert (tmp_path / "figures" / "growth.png").read_bytes().startswith(b"\x89PNG")


# Shares -------------------------------------------------------------------------------------------------------------


def test_a_loss_is_timed_alone_on_the_logits_of_its_step(load: Load) -> None:
    loss, student = DKDLoss(), nn.Linear(3, 7)
    calls = []

    def step() -> None:
        logits = student(torch.ones(5, 3))
        loss(logits, torch.randn(5, 7), torch.arange(5), progress=0.5)
        calls.append(logits)

    share = load("share")
    alone, size = share.loss_alone(loss, step)
    alone()
    assert size == "5 × 7" and len(calls) == 1 and student.weight.grad is None and not loss._forward_pre_hooks
    row = share.measure("DKD", step, loss, rounds=1)
    assert row[:2] == ["DKD", "5 × 7"] and row[2] > 0 and row[4] > 0


def test_waiting_is_the_trainers_own_data_time(load: Load) -> None:
    storage = EventStorage(0)
    waits = iter([9.0, 9.0, 0.1, 0.3])

    def iteration() -> None:
        storage.put_scalar("data_time", next(waits))

    iteration.storage = storage
    assert load("kd_det_loader").waiting(iteration, rounds=2)[1] == pytest.approx(0.2)  # the first two do not count


def test_the_parts_of_mapping_make_up_the_whole_and_are_left_as_they_were(load: Load, tmp_path: Path) -> None:
    loader, read_image = load("kd_det_loader"), detection_utils.read_image
    seconds = loader.mapped(loader.step_cfg(loader.DIGITS / "dkd.yaml", tmp_path), images=4)
    assert tuple(seconds) == loader.PARTS and all(0 < of_part < 1 for of_part in seconds.values())
    assert detection_utils.read_image is read_image


# Report and run -----------------------------------------------------------------------------------------------------

BLOCK = "<!-- bench: core.losses -->\nold\n<!-- /bench -->"


@pytest.fixture
def measured(load: Load, tmp_path: Path) -> Path:
    """A folder with the figures of one benchmark."""
    figures = load("figures")
    figures.write_figures(tmp_path / "core.json", {"losses": figures.Table(["", "ms"], [["kd", 1.25]])})
    return tmp_path


def test_a_block_is_filled_with_its_table_and_where_that_was_measured(load: Load, measured: Path) -> None:
    fill = load("report").fill
    page = fill(f"before\n{BLOCK}\nafter", measured, measured / "figures")
    assert page.startswith("before\n<!-- bench: core.losses -->\n|") and page.endswith("\n<!-- /bench -->\nafter")
    assert "| kd | 1.25 |" in page and "old" not in page and f"torch {torch.__version__.split('+')[0]}" in page
    assert fill(page, measured, measured / "figures") == page
    twice = fill(f"{BLOCK}\n{BLOCK}", measured, measured / "figures")
    assert twice.count("| kd | 1.25 |") == 2 and twice.count("commit") == 1  # of one run, told once


def test_an_empty_block_says_how_to_get_figures_and_another_keeps_those_it_has(load: Load, tmp_path: Path) -> None:
    fill = load("report").fill
    assert "run `make bench`" in fill(BLOCK.replace("old\n", ""), tmp_path, tmp_path)
    assert fill(BLOCK, tmp_path, tmp_path) == BLOCK


def test_wrong_blocks_are_refused(load: Load, measured: Path) -> None:
    fill = load("report").fill
    with pytest.raises(ValueError, match=r"core.json has no table 'other': it has losses"):
        fill(BLOCK.replace("losses", "other"), measured, measured)
    for text in (BLOCK.replace("<!-- /bench -->", ""), BLOCK.replace("<!-- /bench -->", "") + BLOCK):
        with pytest.raises(ValueError, match="has no <!-- /bench --> after it"):
            fill(text, measured, measured)


def test_the_page_has_a_block_of_every_benchmark_and_of_no_other(load: Load) -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    report, run = load("report"), load("run")
    names = [block["name"] for block in report.BLOCK.finditer(page)]
    assert set(names) == {benchmark.name for benchmark in run.BENCHMARKS} and len(names) > len(set(names))


SCRIPT = """import json, sys
path = sys.argv[sys.argv.index("--json") + 1]
json.dump({{"bounds": [{{"name": "ratio", "found": {found}, "bound": 1.0}}]}}, open(path, "w"))
"""


@pytest.mark.parametrize(
    "found, quick, code", [(0.5, False, 0), (1.5, False, 1), (1.5, True, 0), (None, False, 1), (None, True, 1)]
)
def test_the_exit_code_tells_a_missed_bound_and_a_failure_and_all_run(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], found: float | None, quick: bool, code: int
) -> None:
    run, output = load("run"), tmp_path / "output"
    (tmp_path / "first.py").write_text(SCRIPT.format(found=found) if found else "raise SystemExit(0)")
    (tmp_path / "second.py").write_text(SCRIPT.format(found=0.5))
    output.mkdir()
    (output / "first.json").write_text('{"bounds": []}')  # of an earlier run: no excuse
    benchmarks = [run.Benchmark("first"), run.Benchmark("second")]
    assert run.run_all(benchmarks, quick, output, scripts=tmp_path) == code
    printed = capsys.readouterr().out
    assert (output / "second.json").exists() and ("failed" in printed) == (found is None)
    assert ("ratio: 1.50 (≤ 1) **above**" in printed) == (found == 1.5)


def test_an_option_of_the_environment_needs_all_its_variables(load: Load) -> None:
    (loader,) = (b for b in load("run").BENCHMARKS if b.name == "kd_det_loader")
    assert loader.words(False, {"IMAGES_JSON": "a.json"}) == []
    assert loader.words(False, {"IMAGES_JSON": "a.json", "IMAGES_DIR": "b"}) == ["--images", "a.json", "b"]
    assert loader.words(True, {})[:2] == ["--rounds", "1"]


def test_every_benchmark_has_the_options_that_it_is_run_with(load: Load) -> None:
    for benchmark in load("run").BENCHMARKS:
        source = (ROOT / "benchmarks" / f"{benchmark.name}.py").read_text(encoding="utf-8")
        options = [word for word in benchmark.quick + benchmark.full if word.startswith("--")]
        options += [option for option, _ in benchmark.from_environment if option != "--peer"]
        missing = [option for option in options if f'"{option}"' not in source and "step_options(" not in source]
        assert missing == [] and re.search(r"(step_)?options\(__doc__, ", source)
