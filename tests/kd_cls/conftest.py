"""Training runs of a second: a small ResNet on a few of the built-in digits at 16 px."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fvcore.common.config import CfgNode

from kd_cls.config import load_cfg
from kd_cls.distributed import Process
from kd_cls.train import train
from kd_core.losses.feature_config import distils

TINY = {
    "MODEL": {"NAME": "cifar_resnet8"},
    "DATA": {"NAME": "digits", "TRAIN_IMAGES": 64, "VAL_IMAGES": 33, "INPUT_SIZE": 16, "NUM_WORKERS": 0},
    "SOLVER": {"EPOCHS": 2, "IMS_PER_BATCH": 16, "BASE_LR": 0.02, "SCHEDULE": {"NAME": "cosine"}},
    "DEVICE": "cpu",
    "LOG_PERIOD": 2,
    "REPORT": {"ENABLED": False},  # of many trainings; the tests of the report turn it on
}


@pytest.fixture(scope="session")
def process() -> Process:
    """This one process, on the CPU."""
    return Process(torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config file of a plain run of 8 iterations."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture(scope="session")
def teacher_yaml(tiny_yaml: Path, tmp_path_factory: pytest.TempPathFactory, process: Process) -> Path:
    """The config file of a teacher that has been trained; its weights are last.pth in its OUTPUT_DIR."""
    folder = tmp_path_factory.mktemp("teacher")
    path = folder / "teacher.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(tiny_yaml), "OUTPUT_DIR": str(folder / "output"), "SEED": 5}))
    train(load_cfg(str(path)), process)
    return path


@pytest.fixture
def tiny(tiny_yaml: Path, teacher_yaml: Path, tmp_path: Path) -> Callable[..., CfgNode]:
    """`tiny("KEY", value, …)`: the config of a run in a folder of its own, with a teacher where there is a loss."""

    def build(*options: Any) -> CfgNode:
        words = ["OUTPUT_DIR", str(tmp_path / "run"), *map(str, options)]
        cfg = load_cfg(str(tiny_yaml), words)
        if distils(cfg.KD) and not (cfg.KD.TEACHER.NAME or cfg.KD.TEACHER.CONFIG_FILE):
            cfg.KD.TEACHER.CONFIG_FILE = str(teacher_yaml)
        return cfg

    return build


@pytest.fixture
def run(tiny: Callable[..., CfgNode], process: Process) -> Callable[..., dict[str, Any]]:
    """`run("KEY", value, …)`: train to the end; returns last.pth."""

    def build(*options: Any) -> dict[str, Any]:
        cfg = tiny(*options)
        train(cfg, process)
        return torch.load(Path(cfg.OUTPUT_DIR, "last.pth"), weights_only=True)

    return build
