"""Training with the images on the device: the same evaluation, and caches of its own. Resuming: test_resume.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kd_cls.build import build_trainer
from kd_cls.data import ResidentLoader
from kd_cls.distributed import Process
from kd_cls.engine import evaluate
from kd_cls.train import train
from kd_core.utils.errors import UserError

RESIDENT = ["DATA.RESIDENT", True]


def test_without_augmentation_a_run_is_the_same_from_the_device_and_from_the_loader(
    tiny: Callable, process: Process, tmp_path: Path
) -> None:
    options = ["DATA.AUGMENTATION", "none", "KD.LOSS.NAME", "dkd"]
    read = train(tiny(*options, "OUTPUT_DIR", tmp_path / "read"), process)
    resident = train(tiny(*options, *RESIDENT, "OUTPUT_DIR", tmp_path / "resident"), process)
    assert resident["images"] == read["images"] == 33
    assert resident["loss"] == pytest.approx(read["loss"], rel=1e-4) and resident["top1"] == read["top1"]


def test_evaluation_from_the_device_is_that_of_the_loader(tiny: Callable, process: Process) -> None:
    read, resident = (build_trainer(tiny("DATA.RESIDENT", on), process) for on in (False, True))
    assert isinstance(resident.loaders.train, ResidentLoader) and isinstance(resident.loaders.val, ResidentLoader)
    student = read.task.trainable_module.eval()
    first, second = (evaluate(student.predict, trainer.loaders.val, process) for trainer in (read, resident))
    assert first.pop("loss") == pytest.approx(second.pop("loss"), rel=1e-5) and first == second


def test_a_teacher_cache_of_the_other_draws_is_refused(tiny: Callable, process: Process, tmp_path: Path) -> None:
    words = ["KD.LOSS.NAME", "kd", "KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", tmp_path / "logits"]
    build_trainer(tiny(*words), process)
    with pytest.raises(UserError, match=r"is a cache of another resident \(False, this run has True\)"):
        build_trainer(tiny(*words, *RESIDENT), process)
    build_trainer(tiny(*words, "KD.TEACHER.CACHE_DIR", tmp_path / "other", *RESIDENT), process)
