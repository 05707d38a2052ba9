"""Evaluating saved networks."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm import create_model
from timm.data import resolve_data_config
from timm.models import load_checkpoint
from timm.task.evaluator import ClassificationEvaluator

from kd_cls.data import create_datasets, create_loaders
from kd_cls.data.check import check_images
from kd_cls.distributed import Process
from kd_cls.evaluate import evaluate_checkpoint, main
from kd_cls.train import train
from kd_core.utils.errors import UserError


def test_the_command_prints_what_training_found_and_plain_timm_agrees(
    tiny: Callable, process: Process, capsys: pytest.CaptureFixture
) -> None:
    cfg = tiny("SOLVER.EPOCHS", 4, "SOLVER.EVAL_PERIOD", 4, "DATA.VAL_IMAGES", 0)
    trained = train(cfg, process)
    capsys.readouterr()
    metrics = main(["--config-file", str(Path(cfg.OUTPUT_DIR, "config.yaml"))])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == metrics
    assert metrics["images"] == 599 and metrics["top1"] == trained["top1"]

    model = create_model("cifar_resnet8", num_classes=10)
    load_checkpoint(model, str(Path(cfg.OUTPUT_DIR, "best.pth")))
    data = create_datasets("digits")
    mean, std = (
        torch.load(Path(cfg.OUTPUT_DIR, "best.pth"), weights_only=True)["metadata"]["input"][k] for k in ("mean", "std")
    )
    loader = create_loaders(
        data.train, data.val, augmentation="none", input_size=(3, 16, 16), mean=mean, std=std, batch_size=50
    )
    evaluator = ClassificationEvaluator()
    with torch.no_grad():
        for images, target in loader.val:
            evaluator.update(model.eval()(images), target)
    assert evaluator.compute()["top1"] == metrics["top1"]
    assert resolve_data_config(model=model)["input_size"] == (3, 32, 32)


def test_the_students_weights_are_evaluated_and_not_those_that_its_training_started_from(
    tiny: Callable, process: Process, capsys: pytest.CaptureFixture
) -> None:
    first = tiny("OUTPUT_DIR", str(tiny().OUTPUT_DIR) + "_first", "SOLVER.EPOCHS", 4)
    started = train(first, process)
    cfg = tiny("MODEL.WEIGHTS", Path(first.OUTPUT_DIR, "best.pth"), "SOLVER.BASE_LR", 1.0, "SOLVER.EPOCHS", 1)
    trained = train(cfg, process)
    config = ["--config-file", str(Path(cfg.OUTPUT_DIR, "config.yaml"))]
    assert main(config)["loss"] == trained["loss"] != started["loss"]
    assert "evaluating" in capsys.readouterr().out
    assert main([*config, "MODEL.WEIGHTS", str(Path(first.OUTPUT_DIR, "last.pth"))])["loss"] == started["loss"]
    Path(cfg.OUTPUT_DIR, "best.pth").unlink()  # the config's weights are all there is
    assert main(config)["top1"] == started["best_top1"]


def test_it_computes_in_the_precision_of_training(tiny: Callable, process: Process) -> None:
    cfg = tiny("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.EVAL_PERIOD", 2)
    trained = train(cfg, process)
    assert evaluate_checkpoint(cfg, process)["loss"] == trained["loss"]
    cfg.SOLVER.AMP.ENABLED = False
    assert evaluate_checkpoint(cfg, process)["loss"] != trained["loss"]


def test_the_checkpoint_says_how_its_images_are_normalised(tiny: Callable, process: Process) -> None:
    cfg = tiny("MODEL.MEAN", "[0.9, 0.9, 0.9]", "MODEL.STD", "[0.1, 0.2, 0.3]")
    trained = train(cfg, process)
    other = tiny("MODEL.MEAN", "[0, 0, 0]", "DATA.INPUT_SIZE", 32, "MODEL.WEIGHTS", Path(cfg.OUTPUT_DIR, "last.pth"))
    assert evaluate_checkpoint(other, process)["loss"] == trained["loss"]


def test_the_moving_average_is_what_is_evaluated_where_there_is_one(tiny: Callable, process: Process) -> None:
    cfg = tiny("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.7)
    trained = train(cfg, process)
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "last.pth"))
    assert evaluate_checkpoint(cfg, process)["loss"] == trained["ema_loss"] != trained["loss"]


def test_a_checkpoint_that_does_not_fit_is_refused(tiny: Callable, process: Process, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"OUTPUT_DIR: there is no file .*best.pth"):
        evaluate_checkpoint(tiny(), process)
    train(tiny(), process)
    with pytest.raises(
        ValueError, match=r"OUTPUT_DIR: .*best.pth \(a checkpoint of cifar_resnet8, 10 classes\) lacks \d+ weights"
    ):
        evaluate_checkpoint(tiny("MODEL.NAME", "cifar_vgg8"), process)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "pets" / split / name
            folder.mkdir(parents=True)
            create_datasets("digits").val[0][0].save(folder / "1.png")
    pets = tiny("DATA.NAME", "folder", "DATA.ROOT", tmp_path / "pets", "DATA.TRAIN_IMAGES", 0, "DATA.VAL_IMAGES", 0)
    with pytest.raises(UserError, match=r"best.pth knows 10 classes, folder has 2"):
        evaluate_checkpoint(pets, process)


def test_a_single_class_is_refused(tiny: Callable, process: Process, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "pets" / split / "cat").mkdir(parents=True)
        create_datasets("digits").val[0][0].save(tmp_path / "pets" / split / "cat" / "1.png")
    pets = tiny("DATA.NAME", "folder", "DATA.ROOT", tmp_path / "pets", "DATA.TRAIN_IMAGES", 0, "DATA.VAL_IMAGES", 0)
    with pytest.raises(UserError, match=r"pets: cat is the only class: nothing to tell apart"):
        train(pets, process)
    report, _ = check_images("folder", tmp_path / "pets")
    assert report.problems["a single class"] == ["cat: there is nothing to tell apart"]


def test_an_empty_class_folder_is_named_before_training(tiny: Callable, process: Process, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / "pets" / split / "cat").mkdir(parents=True)
        create_datasets("digits").val[0][0].save(tmp_path / "pets" / split / "cat" / "1.png")
        (tmp_path / "pets" / split / "unicorn").mkdir()
    pets = tiny("DATA.NAME", "folder", "DATA.ROOT", tmp_path / "pets", "DATA.TRAIN_IMAGES", 0, "DATA.VAL_IMAGES", 0)
    with pytest.raises(UserError, match=r"unicorn"):
        train(pets, process)
