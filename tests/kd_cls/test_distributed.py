"""Two gloo ranks, and one process on the whole batch. What a rank does is in train_ranks.py."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import HELPERS, forked
from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.distributed import Process
from kd_cls.evaluate import evaluate_checkpoint
from kd_core.utils.errors import UserError

WORKER = HELPERS / "train_ranks.py"
# 20 steps of DeepKD, no augmentation, BatchNorm in eval mode. 33 images for validation: not a multiple of 2.
OPTIONS = [
    *["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "KD.LOSS.TOPK.ENABLED", "True"],
    *["MODEL.FREEZE_BN", "True", "DATA.AUGMENTATION", "none", "DATA.TRAIN_IMAGES", "64", "SOLVER.EPOCHS", "5"],
    *["SOLVER.EVAL_PERIOD", "5", "SOLVER.BASE_LR", "0.002"],
]


@pytest.fixture(scope="module")
def ranks(tiny_yaml: Path, teacher_yaml: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks ended with; `train_ranks.py` in a gloo group."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [tiny_yaml, folder, *OPTIONS, "KD.TEACHER.CONFIG_FILE", teacher_yaml]
    for done in forked.run_ranks(2, [WORKER, *words]):
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture
def alone(tiny: Callable, process: Process) -> dict[str, Any]:
    """What one process ends with."""
    cfg = tiny(*OPTIONS)
    trainer = build_trainer(cfg, process)
    metrics = trainer.run()
    student = trainer.task.trainable_module.state_dict()
    return {"student": student, "metrics": metrics, "evaluated": evaluate_checkpoint(cfg, process)}


def test_ranks_are_identical_to_the_bit(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["student"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert ranks[0]["metrics"]["top1"] == ranks[1]["metrics"]["top1"]


def test_the_parameters_of_a_feature_loss_are_identical_too(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["feature"] for rank in ranks)
    assert len(first) > 10 and all(torch.equal(first[name], second[name]) for name in first)


def test_two_ranks_train_as_one_process_on_the_whole_batch(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    assert ranks[0]["seen"] == ranks[1]["seen"] == [8] * 20
    one, two = alone["student"], ranks[0]["student"]
    assert max(float((one[name] - two[name]).abs().max()) for name in one) <= 1e-5


def test_every_image_counts_once_in_an_evaluation(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    for found in (*ranks, alone):
        assert found["metrics"]["images"] == found["evaluated"]["images"] == 33
        assert found["metrics"]["top1"] == found["evaluated"]["top1"] == alone["metrics"]["top1"]
        assert found["evaluated"]["loss"] == pytest.approx(alone["metrics"]["loss"], abs=1e-5)


def test_a_batch_that_does_not_divide_is_refused(tiny: Callable) -> None:
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH is 16, expected a multiple of 3 \(3 processes"):
        check_config(tiny(), Process(torch.device("cpu"), world_size=3))
