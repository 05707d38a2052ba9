"""What the benchmarks conclude from their figures: slopes, the model of many GPUs, the report, the exit code."""

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


# Many GPUs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(load: Load) -> ModuleType:
    return load("scaling_model")


def parts(model: ModuleType, backwards: tuple[float, ...], buckets: tuple[int, ...], fill: float = 0.0) -> object:
    return model.Parts(forward=2.0, backwards=backwards, fill=fill, step=1.0, buckets=buckets)


def test_a_ring_sends_nearly_twice_the_bytes_in_two_hops_a_gpu(model: ModuleType) -> None:
    link = model.Link(bandwidth=100.0, latency=0.5)
    assert model.all_reduce_seconds(400, 4, link) == pytest.approx(2 * 3 / 4 * 4 + 6 * 0.5)
    assert model.all_reduce_seconds(400, 1, link) == 0


def test_one_gpu_communicates_nothing_and_fills_no_buckets(model: ModuleType) -> None:
    one = parts(model, (3.0, 4.0), (400,), fill=9.0)
    exposed = model.exposed_seconds(one, 1, model.Link(1e-9, 1e9))
    assert exposed == 0 and model.step_seconds(one, 1, exposed) == 2 + 3 + 4 + 1


def test_a_set_travels_behind_the_next_sets_pass_and_the_last_one_is_exposed(model: ModuleType) -> None:
    link = model.Link(bandwidth=75e9, latency=0.0)  # 50e9 bytes over 4 GPUs: one second
    two = parts(model, (3.0, 3.0), (50 * 10**9,))
    assert model.exposed_seconds(two, 4, link) == pytest.approx(1)
    # The second pass, 3 … 3.25, is too short to hide the first set: that travels in 3 … 4, the second in 4 … 5.
    assert model.exposed_seconds(parts(model, (3.0, 0.25), (50 * 10**9,)), 4, link) == pytest.approx(1.75)
    assert model.step_seconds(two, 4, 1.0) == 2 + 3 + 3 + 1 + 1


def test_buckets_that_leave_at_once_expose_the_last_one_only(model: ModuleType) -> None:
    link = model.Link(bandwidth=75e9, latency=0.0)
    halves = parts(model, (4.0,), (25 * 10**9,) * 2)
    assert model.exposed_seconds(halves, 4, link) == pytest.approx(1)
    assert model.exposed_seconds(halves, 4, link, bucket_by_bucket=True) == pytest.approx(0.5)


def test_filling_buckets_and_the_bitmap_are_paid_for(model: ModuleType) -> None:
    filled = parts(model, (3.0, 3.0), (1,), fill=0.5)
    assert model.step_seconds(filled, 2, 0.0) == 2 + 6 + 2 * 0.5 + 1
    latency = model.Link(bandwidth=1e30, latency=0.25)
    assert model.exposed_seconds(filled, 2, latency) == pytest.approx(2 * 0.25 + 2 * 0.25)  # last bucket, bitmap


def test_without_communication_every_gpu_brings_its_whole_speed(model: ModuleType) -> None:
    free = model.Link(bandwidth=1e30, latency=0.0)
    rows = model.scaling_table({"KD": parts(model, (3.0,), (400,))}, free, free).rows
    assert [row[1] for row in rows] == [1, 8, 64, 512] and {row[5] for row in rows} == {"100.0%"}
    slow = model.Link(bandwidth=2e9, latency=0.0)
    rows = model.scaling_table({"KD": parts(model, (3.0,), (4 * 10**9,))}, free, slow, gpus=(8, 64)).rows
    assert rows[0][5] == "100.0%" and rows[1][5] == f"{6 / (6 + 2 * 63 / 64 * 2):.1%}"  # beyond a node, the slow link


def test_a_faster_device_shortens_what_is_computed_and_nothing_else(model: ModuleType) -> None:
    fast = parts(model, (3.0, 4.0), (400,), fill=0.5).faster(10)
    assert (fast.forward, fast.backwards, fast.fill, fast.step) == (0.2, (0.3, 0.4), 0.05, 0.1)
    assert fast.buckets == (400,)


def test_parts_from_the_command_line_are_checked(load: Load) -> None:
    scaling = load("scaling")
    (given,) = scaling.given_parts([0.1, 0.2, 0.3, 0.01], 20e6).values()
    assert given.backwards == (0.2, 0.3) and sum(given.buckets) == 80e6 and len(given.buckets) == 4
    with pytest.raises(ValueError, match="give FORWARD, a BACKWARD a set and STEP"):
        scaling.given_parts([0.1, 0.2], 20e6)
    with pytest.raises(ValueError, match="--parameters 0"):
        scaling.given_parts([0.1, 0.2, 0.3], 0)


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


def test_a_block_without_figures_says_how_to_get_them(load: Load, tmp_path: Path) -> None:
    assert "run `make bench`" in load("report").fill(BLOCK, tmp_path, tmp_path)


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
