"""WatchHealth on a real tiny training that is made sick in one way each, and on a sound one."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import TrainerBase
from detectron2.engine.train_loop import SimpleTrainer

from helpers.tiny_detector import make_batch
from kd_det import DistilledRCNN
from kd_det.config.student import student_config
from kd_det.engine.hooks import health
from kd_det.engine.hooks.health import WatchHealth


@pytest.fixture
def train(tiny_cfg: Callable[..., CfgNode], monkeypatch, caplog) -> Callable[..., list[str]]:
    """`train(make_sick, iterations)`: what is warned of in a training that looks at every second iteration."""
    monkeypatch.setattr(health, "PERIOD", 2)

    def run(
        make_sick: Callable[[torch.nn.Module], object], iterations: int = 14, lr: float = 1e-4, classes: int = 10
    ) -> list[str]:
        torch.manual_seed(0)
        cfg = tiny_cfg("KD.LOSS.NAME", "dkd", "MODEL.ROI_HEADS.NUM_CLASSES", classes)
        Path(cfg.KD.TEACHER.CONFIG_FILE).write_text(student_config(cfg).dump())
        model = DistilledRCNN(cfg).train()
        make_sick(model)
        batches = [make_batch(seed=index) for index in range(iterations)]
        for image in (image for batch in batches for image in batch):
            image["instances"].gt_classes %= classes
        optimizer = torch.optim.SGD(model.parameters(), lr)
        trainer = SimpleTrainer(model, batches, optimizer)
        trainer.register_hooks([WatchHealth(model)])
        with caplog.at_level(logging.WARNING, logger="kd_det.engine.hooks.health"):
            TrainerBase.train(trainer, 0, iterations)
        return [record.getMessage() for record in caplog.records if record.name == "kd_det.engine.hooks.health"]

    return run


def kill_box_head(model: torch.nn.Module) -> None:
    for parameter in model.roi_heads.box_head.parameters():
        torch.nn.init.zeros_(parameter)
        parameter.requires_grad_(False)


def let_maps_explode(model: torch.nn.Module) -> None:
    model.backbone.register_forward_hook(lambda _, __, maps: {name: 1e4 * m for name, m in maps.items()})


def test_a_dead_box_head_is_told_with_its_cure(train):
    warnings = train(kill_box_head)
    assert any("the box head gives every box the same scores" in w and "MODEL.FPN.NORM GN" in w for w in warnings)


def test_maps_that_explode_are_told_once(train):
    warnings = [w for w in train(let_maps_explode, iterations=20, lr=0.0) if "standard deviation above 50" in w]
    assert len(warnings) == 1


@pytest.mark.parametrize(("iterations", "told"), [(8, False), (9, True)])
def test_four_bad_checks_are_read_at_the_fifth(train, iterations, told):
    assert any("standard deviation above 50" in w for w in train(let_maps_explode, iterations, lr=0.0)) == told


def test_a_distillation_term_that_does_not_change_is_named(train):
    def weigh_nothing(model: torch.nn.Module) -> None:
        model.loss.beta = 0.0

    assert any("loss_kd_nckd has not changed" in w for w in train(weigh_nothing))


def test_a_detector_of_one_class_hears_nothing_of_its_non_target_term_which_is_always_0(train):
    assert not any("has not changed" in w for w in train(lambda model: None, classes=1))


def test_a_sound_training_hears_nothing_of_dead_heads_or_maps(train):
    warnings = train(lambda model: None)
    assert not any("same scores" in w or "standard deviation" in w or "has not changed" in w for w in warnings)
