"""Killed and resumed in the middle of an epoch: the same end to the bit."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from helpers import forked
from kd_cls.build import build_trainer
from kd_cls.checkpoint.resume import check_resumable
from kd_cls.config import load_cfg
from kd_cls.distributed import Process
from kd_cls.train import train
from kd_core.utils.errors import UserError

METHODS = {
    "plain": [],
    "deepkd": ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "KD.LOSS.TOPK.ENABLED", True],
    "deepkd, fp16, averaged, in parts, clipped": [
        *["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.DEEPKD.DELTA_NCG", 0.05],
        *["SOLVER.AMP.ENABLED", True, "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.WARMUP", True],
        *["SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.CLIP_GRADIENTS.ENABLED", True],
        *["DATA.TRAIN_IMAGES", 16, "SOLVER.IMS_PER_BATCH", 4, "DATA.VAL_IMAGES", 8],  # float16 is slow on a CPU
    ],
    "aekt, mixed dropout": ["KD.LOSS.NAME", "aekt", "MODEL.KWARGS", "{drop_rate: 0.3}", "SOLVER.EMA.ENABLED", True],
    "gdkd, mixup": ["KD.LOSS.NAME", "gdkd", "SOLVER.MIXUP.ALPHA", 0.4, "SOLVER.LABEL_SMOOTHING", 0.1],
    "momenta auto": [
        *["KD.LOSS.NAME", "dkd", "SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 6],
    ],
    "images on the device": ["DATA.RESIDENT", True, "DATA.AUGMENTATION", "cifar"],
    "two views": [
        *["KD.LOSS.NAME", "mlkd", "DATA.VIEWS", 2, "SOLVER.OPTIMIZER", "deepkd_sgd", "DATA.AUGMENTATION", "cifar"],
    ],
    "review, averaged, in parts, clipped": [
        *["KD.LOSS.NAME", "dkd", "KD.FEATURE.NAME", "review", "KD.FEATURE.WARMUP_EPOCHS", 1],
        *["SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.EMA.ENABLED", True, "SOLVER.ACCUMULATE_STEPS", 2],
        *["SOLVER.CLIP_GRADIENTS.ENABLED", True],
    ],
    "adamw": ["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "stream_adamw", "SOLVER.BASE_LR", 1e-3],
}


class Killed(BaseException):
    """What no handler catches."""


def same(first: Any, second: Any, path: str = "") -> list[str]:
    """Where two checkpoints differ, to the bit."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [path]
    if isinstance(first, dict):
        assert first.keys() == second.keys(), path
        return [place for key in first for place in same(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple):
        return [place for i, pair in enumerate(zip(first, second, strict=True)) for place in same(*pair, f"{path}/{i}")]
    return [] if first == second else [path]


def last(folder: str | Path) -> dict[str, Any]:
    """last.pth without what says where the run was and how long it took."""
    checkpoint = torch.load(Path(folder, "last.pth"), weights_only=True)
    del checkpoint["metadata"]["config"], checkpoint["training"]["seconds"]
    return checkpoint


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_run_killed_in_the_middle_of_an_epoch_ends_as_an_undisturbed_one(
    options: list, tiny: Callable, process: Process, tmp_path: Path
) -> None:
    options = [*options, "SOLVER.CHECKPOINT_PERIOD", 3]
    whole = tiny(*options, "OUTPUT_DIR", tmp_path / "whole")
    train(whole, process)
    cut = tiny(*options, "OUTPUT_DIR", tmp_path / "cut")
    trainer = build_trainer(cut, process)
    after_step = trainer.after_step

    def killed_after_5() -> None:
        after_step()
        if trainer.iteration == 5:
            raise Killed

    trainer.after_step = killed_after_5
    with pytest.raises(Killed):
        trainer.run()
    assert last(tmp_path / "cut")["training"]["iteration"] == 3
    torch.randn(7)  # whatever happens in between
    train(cut, process, resume=True)
    assert same(last(tmp_path / "whole"), last(tmp_path / "cut")) == []
    written = [line.split(",")[0] for line in (tmp_path / "cut" / "metrics.json").read_text().splitlines()]
    assert len(written) == len(set(written)) + 2  # each iteration once, but for the evaluations beside 4 and 8


def test_kill_9_with_a_worker_and_resume_ends_as_an_undisturbed_run(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["--config-file", str(tiny_yaml), "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.EPOCHS", "3", "LOG_PERIOD", "1"]
    words += ["DATA.NUM_WORKERS", "1", "SOLVER.EVAL_PERIOD", "3"]
    command = ["-m", "kd_cls.train", *words]
    assert forked.run([*command, "OUTPUT_DIR", tmp_path / "whole"]).returncode == 0
    metrics = tmp_path / "cut" / "metrics.json"
    with forked.started_command([*command, "OUTPUT_DIR", tmp_path / "cut"], tmp_path / "said") as running:
        limit = time.monotonic() + 120
        while time.monotonic() < limit and not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            time.sleep(0.002)
        os.killpg(running.pid, signal.SIGKILL)  # the worker too
        running.join()
        assert running.exitcode == -signal.SIGKILL
    assert 0 < last(tmp_path / "cut")["training"]["iteration"] < 12
    assert forked.run([*command, "--resume", "OUTPUT_DIR", tmp_path / "cut"]).returncode == 0
    assert same(last(tmp_path / "whole"), last(tmp_path / "cut")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.EPOCHS", 3], r"was started with SOLVER.EPOCHS 2.0, now it is 3.0; that would mix two runs"),
        (["MODEL.NAME", "cifar_resnet14"], r"started with MODEL.NAME 'cifar_resnet8'"),
        (["KD.LOSS.NAME", "kd"], r"started with KD.LOSS.NAME 'none', now it is 'kd'"),
    ],
)
def test_another_run_is_not_resumed(tiny: Callable, process: Process, options: list, message: str) -> None:
    train(tiny("SOLVER.EPOCHS", 2), process)
    with pytest.raises(UserError, match=message):
        train(tiny(*options), process, resume=True)


def test_a_run_is_not_resumed_on_other_images(folder_words: list[str], tiny: Callable, process: Process) -> None:
    """Its schedule would have the old length."""
    root = Path(folder_words[3])
    train(tiny(*folder_words), process)
    for name in ("a", "b"):
        shutil.copytree(root / "train" / name, root / "train" / name / "more")
    with pytest.raises(UserError, match=r"--resume: the run was started with 4 iterations, now there are 8: "):
        train(tiny(*folder_words), process, resume=True)
    for split in ("train", "val"):
        shutil.copytree(root / split / "a", root / split / "c")
    with pytest.raises(UserError, match=r"--resume: the run was started with 2 classes, now there are 3: "):
        train(tiny(*folder_words), process, resume=True)


@pytest.fixture
def folder_words(tmp_path: Path) -> list[str]:
    """Two classes of eight training images and one validation image each; four iterations."""
    for split, count in (("train", 8), ("val", 1)):
        for name in ("a", "b"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                Image.effect_noise((8, 8), 90).save(tmp_path / "images" / split / name / f"{number}.png")
    words = ["DATA.NAME", "folder", "DATA.ROOT", str(tmp_path / "images"), "DATA.AUGMENTATION", "none"]
    return [*words, "DATA.TRAIN_IMAGES", 0, "DATA.VAL_IMAGES", 0, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.EPOCHS", 1]


def test_where_files_are_and_what_is_shown_may_change(tiny: Callable, process: Process) -> None:
    train(tiny(), process)
    train(tiny("LOG_PERIOD", 1, "DATA.NUM_WORKERS", 0, "SOLVER.CHECKPOINT_PERIOD", 2), process, resume=True)


def test_a_resumed_run_keeps_its_mean_and_std_wherever_its_first_weights_are_now(
    tiny: Callable, process: Process, tmp_path: Path
) -> None:
    train(tiny("MODEL.MEAN", "[0.9, 0.8, 0.7]", "SOLVER.EPOCHS", 0.25, "OUTPUT_DIR", tmp_path / "first"), process)
    words = ["SOLVER.EPOCHS", 0.5, "SOLVER.CHECKPOINT_PERIOD", 1]
    trainer = build_trainer(tiny(*words, "MODEL.WEIGHTS", tmp_path / "first" / "last.pth"), process)
    after_step = trainer.after_step

    def killed_after_1() -> None:
        after_step()
        raise Killed

    trainer.after_step = killed_after_1
    with pytest.raises(Killed):
        trainer.run()
    cfg = tiny(*words)  # does not name the weights any more
    first = last(cfg.OUTPUT_DIR)
    train(cfg, process, resume=True)
    second = last(cfg.OUTPUT_DIR)
    assert (first["metadata"]["iteration"], second["metadata"]["iteration"]) == (1, 2)
    assert first["metadata"]["input"] == second["metadata"]["input"]
    assert second["metadata"]["input"]["mean"] == [0.9, 0.8, 0.7]  # those that the first weights were trained with


def test_weights_alone_and_broken_files_are_not_resumed(tiny: Callable, process: Process) -> None:
    cfg = tiny()
    train(cfg, process)
    path = Path(cfg.OUTPUT_DIR, "last.pth")
    path.write_bytes(Path(cfg.OUTPUT_DIR, "best.pth").read_bytes())
    with pytest.raises(UserError, match=r"--resume: this checkpoint holds weights only"):
        train(cfg, process, resume=True)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"--resume: .*last.pth cannot be read as a checkpoint: it is truncated"):
        train(cfg, process, resume=True)


def test_a_config_written_by_the_first_version_still_resumes() -> None:
    root = Path(__file__).parents[3]
    written = root / "tests" / "golden" / "config_96e214b_classification.yaml"  # of configs/Digits/cls_deepkd.yaml
    checkpoint = {"training": {}, "metadata": {"config": written.read_text()}}
    check_resumable(checkpoint, load_cfg(str(root / "configs" / "Digits" / "cls_deepkd.yaml"), ["DEVICE", "cpu"]))
    load_cfg(str(written))  # every key is still there
    with pytest.raises(UserError, match=r"started with KD.LOSS.NAME 'dkd', now it is 'kd'"):
        check_resumable(checkpoint, load_cfg(str(written), ["KD.LOSS.NAME", "kd"]))
