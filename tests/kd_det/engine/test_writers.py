"""Weights & Biases: asked for only when it is wanted, and given every scalar once, under its iteration."""

import os
import sys

import pytest
from detectron2.utils.events import EventStorage

from kd_core.utils.errors import UserError
from kd_det.engine.writers import WandbWriter, build_wandb_writers


class Run:
    """A run of wandb's, as far as it is used."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, scalars, step):
        self.logged.append((step, scalars))

    def finish(self):
        self.finished = True


def test_it_is_not_imported_unless_it_is_wanted_and_its_absence_is_said_with_the_remedy(tiny_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    assert build_wandb_writers(tiny_cfg(), int) == []
    with pytest.raises(UserError, match=r"WANDB.ENABLED is True, but the wandb package is not installed: pip install"):
        build_wandb_writers(tiny_cfg("WANDB.ENABLED", True), int)


def test_a_resumed_training_continues_its_run_and_a_new_one_has_its_own(tiny_cfg, monkeypatch):
    begun = []

    class Package:
        @staticmethod
        def init(**options):
            begun.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    cfg = tiny_cfg("WANDB.ENABLED", True, "WANDB.PROJECT", "birds")
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    for start in (0, 20, 0):
        (writer,) = build_wandb_writers(cfg, lambda start=start: start)
        assert isinstance(writer, WandbWriter)
        with EventStorage(start):
            writer.write()
        writer.close()
    first, resumed, again = begun
    assert first == resumed and first["resume"] == "allow" and first["project"] == "birds"
    assert first["config"]["MODEL"]["RESNETS"]["DEPTH"] == 50 and first["name"] == "output"
    assert again["id"] != first["id"]


def test_each_scalar_is_sent_once_under_its_iteration():
    run = Run()
    writer = WandbWriter(lambda: run)
    with EventStorage() as storage:
        storage.put_scalar("loss", 4.0)
        storage.put_scalar("lr", 0.1, smoothing_hint=False)
        writer.write()
        writer.write()
        storage.step()
        storage.put_scalar("loss", 2.0)
        writer.write()
        writer.close()
    assert run.logged == [(0, {"loss": 4.0, "lr": 0.1}), (1, {"loss": 3.0})]  # the median of both
    assert run.finished
