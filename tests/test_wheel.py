"""The wheel, installed without the clone: its commands check data and distil from a config that it brings."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import kd_det.data  # noqa: F401  (registers the digits)
from helpers.few_digits import few_digits
from helpers.processes import run
from kd_core.utils.config import find_config
from kd_det.modeling.teacher.lazy import config_path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("kd_core", "kd_det", "kd_cls", "tools", "configs", "setup.py", "pyproject.toml", "README.md")
SMALL = [  # the built-in digits' network at 64 px
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "SOLVER.MAX_ITER", "5", "SOLVER.STEPS", "()",
    "SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "0", "KD.TEACHER.WEIGHTS", "",
    "KD.TEACHER.ALLOW_RANDOM", "True",
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel of this clone was installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for part in PARTS:  # building leaves files behind
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", "-w", folder, source], check=True)
    subprocess.run([*pip, "install", *offline, "--target", site, *folder.glob("*.whl")], check=True)
    return site


def call(site: Path, cwd: Path, name: str, *words: object) -> subprocess.CompletedProcess:
    """A console command of the installed wheel, outside the clone."""
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return run([sys.executable, site / "bin" / name, *words], env=env, cwd=cwd)


def test_installed_commands_check_data_and_distil_five_iterations(installed, tmp_path):
    _, json_file, images = few_digits(tmp_path, 4)
    done = call(installed, tmp_path, "kd-check-data", json_file, images)
    assert done.returncode == 0 and "nothing is wrong" in done.stdout, done.stderr

    register = f"[[wheel_train, {json_file}, {images}]]"
    data = ["DATASETS.REGISTER", register, "DATASETS.TRAIN", "(wheel_train,)", "DATASETS.TEST", "()"]
    words = ["--config-file", "Digits/dkd.yaml", "--num-gpus", "0", *SMALL, *data, "OUTPUT_DIR", tmp_path / "out"]
    done = call(installed, tmp_path, "kd-train", *words)
    assert done.returncode == 0, done.stderr
    assert f"{installed / 'kd_configs' / 'Digits' / 'dkd.yaml'}" in (tmp_path / "out" / "log.txt").read_text()
    last = json.loads((tmp_path / "out" / "metrics.json").read_text().splitlines()[-1])
    assert last["iteration"] == 4 and last["loss_kd_nckd"] > 0
    assert (tmp_path / "out" / "student.yaml").is_file()


def test_an_installed_command_answers_a_wrong_call_in_one_line(installed, tmp_path):
    for name, words in {
        "kd-distill": ["--teacher", "a.yaml", "a.pth", "--student", "resnet18", "--output", "out"],
        "kd-report": ["no", "--html", "page.html"],
    }.items():
        done = call(installed, tmp_path, name, *words)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert "there is no" in done.stderr.splitlines()[-1]


def test_every_command_of_setup_py_exists():
    required: dict[str, list[str]] = {}
    exec((ROOT / "setup.py").read_text().split("setup(")[0], required)
    for line in required["COMMANDS"]:
        module, _, function = line.split(" = ")[1].partition(":")
        assert callable(getattr(importlib.import_module(module.replace("kd_tools", "tools")), function))


def test_configs_are_found_by_the_names_that_a_wheel_gives_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = ROOT / "configs" / "Digits" / "teacher.yaml"
    assert Path(find_config("Digits/teacher.yaml")) == Path(find_config("configs/Digits/teacher.yaml")) == expected
    assert find_config("Digits/none.yaml") == "Digits/none.yaml"
    lazy = ROOT / "configs" / "LazyCOCO" / "deepkd_r18_vitdet_b.py"
    assert Path(config_path("LazyCOCO/deepkd_r18_vitdet_b.py", "--config-file")) == lazy
    (tmp_path / "Digits").mkdir()
    (tmp_path / "Digits" / "teacher.yaml").write_text(yaml.safe_dump({"SEED": 1}))
    assert find_config("Digits/teacher.yaml") == "Digits/teacher.yaml"  # a file of one's own goes first
