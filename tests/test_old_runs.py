"""Trainings that commit 96e214b left half-finished (tests/fixtures/96e214b) resume and evaluate as they did there."""

import importlib.util
import lzma
import shutil
from pathlib import Path

import pytest
import torch

from helpers import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "96e214b"


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one of the packages, with the unpacked checkpoints; one thread, as they were written."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(FIXTURES / request.param, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*.xz"):
        path.with_suffix("").write_bytes(lzma.decompress(path.read_bytes()))
    (ROOT / "datasets").mkdir(exist_ok=True)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")  # where the digits are written once for all tests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def check_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal to the bit where instruction set and torch are those that the fixture was written with, else close."""
    assert found.keys() == expected.keys()
    same_machine = (FIXTURES / "machine.txt").read_text().split() == [
        torch.backends.cpu.get_cpu_capability(), torch.__version__.split("+")[0]
    ]  # fmt: skip
    tolerance = {"rtol": 0.0, "atol": 0.0} if same_machine else {"rtol": 1e-2, "atol": 1e-3}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def run_detection(*words: str) -> object:
    """tools/train_net.py in this process."""
    from kd_det.engine.launch import argument_parser

    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool.main(argument_parser("").parse_args(["--num-gpus", "0", *words]))


@pytest.mark.parametrize("folder", ["det"], indirect=True)
@pytest.mark.parametrize("run", ["deepkd", "aekt"])
def test_a_detectors_training_resumes_to_the_same_weights(folder: Path, run: str) -> None:
    begun = load(folder / run / "model_0000002.pth")
    run_detection("--resume", "--config-file", f"{run}/config.yaml")
    ended, expected = load(folder / run / "model_final.pth"), load(folder / run / "end.pth")
    assert ended["iteration"] == 5 and not torch.equal(*(next(iter(s["model"].values())) for s in (begun, ended)))
    check_weights(ended["model"], expected["model"])
    assert ("ema" in ended) == ("ema" in expected) == (run == "deepkd")
    if "ema" in expected:
        check_weights(ended["ema"], expected["ema"])


@pytest.mark.parametrize("folder", ["det"], indirect=True)
def test_a_detectors_checkpoint_is_loaded_for_evaluation_without_its_teacher(folder: Path) -> None:
    from detectron2.engine import DefaultPredictor

    from kd_det.config import kd_defaults, merge_file, merge_list

    (folder / "teacher.pth").unlink()
    cfg = kd_defaults()
    merge_file(cfg, "deepkd/config.yaml")
    merge_list(cfg, ["MODEL.WEIGHTS", "deepkd/model_0000002.pth"])
    found = DefaultPredictor(cfg).model.state_dict()
    expected = load(folder / "deepkd" / "model_0000002.pth")["model"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("folder", ["cls"], indirect=True)
def test_a_classifiers_training_resumes_to_the_same_weights_and_is_evaluated(folder: Path) -> None:
    from kd_cls.evaluate import main as evaluate
    from kd_cls.train import main as train

    expected = load(folder / "end.pth")
    shutil.copy(folder / "middle.pth", folder / "deepkd" / "last.pth")
    middle = evaluate(["--config-file", "deepkd/config.yaml", "MODEL.WEIGHTS", "deepkd/last.pth"])
    assert middle["images"] == 33 and middle["loss"] == pytest.approx(2.289021, rel=1e-4)
    train(["--config-file", "deepkd/config.yaml", "--resume"])
    ended = load(folder / "deepkd" / "last.pth")
    assert ended["training"]["iteration"] == 8
    check_weights(ended["model"], expected["model"])
    check_weights(ended["model_ema"], expected["model_ema"])
