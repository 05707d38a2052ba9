"""What a training leaves for readers: a short console, run.json, report.html at every evaluation, a status line."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers import forked
from helpers.few_digits import few_digits
from helpers.report_runs import Page
from kd_core.utils.report.live import status_line, write_live_report

ROOT = Path(__file__).resolve().parents[2]


def train_tiny(folder: Path, *options: str, flags: tuple[str, ...] = ()) -> str:
    """Two iterations more than an evaluation of a tiny detector; returns what the console shows."""
    entry = few_digits(folder, 3)
    words = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", f"('{entry[0]}',)", "TEST.EVAL_PERIOD", "20"]
    words += ["SOLVER.MAX_ITER", "22", "SOLVER.STEPS", "(21,)", "OUTPUT_DIR", str(folder / "run")]
    command = ["tools/train_net.py", "--config-file", "tests/tools/tiny.yaml", "--num-gpus", "0"]
    done = forked.run([*command, *flags, *words, *options])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """OUTPUT_DIR of a training, and what it printed."""
    folder = tmp_path_factory.mktemp("live")
    return folder / "run", train_tiny(folder, "REPORT.ENABLED", "True")


def test_the_console_says_in_ten_lines_what_is_trained_and_log_txt_has_the_rest_once(trained):
    output, printed = trained
    start = printed[: printed.index("Starting training")].splitlines()[:-1]
    assert len(start) <= 10 and "Environment info" not in printed and "Model:" not in printed
    for words in ("method    plain", "M parameters", "digits_train", "22 iterations of 2 images", str(output)):
        assert any(words in line for line in start), start
    log = (output / "log.txt").read_text()
    for words in ("Environment info", "Running with full config", "Model:", "Starting training from iteration 0"):
        assert log.count(words) == 1, words
    assert "About" in printed and "s per iteration" in printed


def test_run_json_says_how_it_was_made(trained):
    info = json.loads((trained[0] / "run.json").read_text())
    assert "tools/train_net.py --config-file tests/tools/tiny.yaml" in info["command"]
    assert info["versions"]["torch"] and info["seed"] == 0 and info["max_iter"] == 22 and info["parameters"] > 1000


def test_the_last_line_of_the_log_is_the_status_and_the_page_has_the_last_figures(trained):
    output, _ = trained
    last = (output / "log.txt").read_text().splitlines()[-1]
    assert "Status: finished, iteration 22 of 22 (100 %), AP" in last
    page = Page((output / "report.html").read_text())
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "bbox/AP" in line] == [19, 22]
    ((shown, _),) = page.numbers["bbox/AP", str(output)]
    assert shown == [line["bbox/AP"] for line in lines if "bbox/AP" in line][-1]
    assert "http-equiv" not in (output / "report.html").read_text() and any("jpeg" in image for image in page.images)


def test_tensorboard_has_the_pictures_of_the_page(trained):
    events = EventAccumulator(str(trained[0]), size_guidance={"images": 0}).Reload()
    names = events.Tags()["images"]
    assert names and all(name.endswith("/plain") for name in names)
    assert {event.step for name in names for event in events.Images(name)} == {19, 22}
    assert Image.open(io.BytesIO(events.Images(names[0])[-1].encoded_image_string)).size == (384, 384)


def test_verbose_prints_config_environment_and_model(tmp_path):
    printed = train_tiny(tmp_path, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", "()", flags=("--verbose",))
    assert all(words in printed for words in ("Environment info", "Running with full config", "Model:"))
    assert not (tmp_path / "run" / "report.html").exists()  # tiny.yaml turns it off


def test_a_page_that_fails_is_logged_and_the_old_one_stays(tmp_path, caplog):
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "config.yaml").write_text("SEED: 0\n")

    def read(_: Path):
        raise KeyError("a bug in a page")

    write_live_report(tmp_path, read, lambda *_: None, running=True)
    assert "everything else continues" in caplog.text and (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize(
    ("iteration", "values", "line"),
    [
        (400, [(199, 31.0), (399, 30.12)], "Status: at iteration 400 of 700 (57 %), AP 30.12, best 31.00 at 199"),
        (20, [], "Status: at iteration 20 of 700 (3 %), not evaluated yet"),
        (701, [(701, 45.4)], "Status: finished, iteration 700 of 700 (100 %), AP 45.40, best 45.40 at 700"),
        (700, [(700, float("nan"))], "Status: finished, iteration 700 of 700 (100 %), AP nan, best nan at 700"),
    ],
    ids=["running", "not evaluated", "finished and resumed", "nothing detected"],
)
def test_the_status_line(iteration, values, line):
    assert status_line(iteration, 700, "AP", values) == line
