"""Weights & Biases: asked for only when it is wanted, and given every scalar once, under its iteration."""

import sys

import pytest
from detectron2.utils.events import EventStorage

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
    assert build_wandb_writers(tiny_cfg()) == []
    with pytest.raises(ValueError, match=r"WANDB.ENABLED is True, but the wandb package is not installed: pip install"):
        build_wandb_writers(tiny_cfg("WANDB.ENABLED", True))


def test_a_run_is_begun_with_the_config_and_goes_on_under_the_same_identity(tiny_cfg, monkeypatch):
    begun = []

    class Package:
        @staticmethod
        def init(**options):
            begun.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    cfg = tiny_cfg("WANDB.ENABLED", True, "WANDB.PROJECT", "birds")
    for _ in range(2):
        (writer,) = build_wandb_writers(cfg)
        assert isinstance(writer, WandbWriter)
    first, second = begun
    assert first == second and first["resume"] == "allow" and first["project"] == "birds"
    assert first["config"]["MODEL"]["RESNETS"]["DEPTH"] == 50 and first["name"] == "output"


def test_each_scalar_is_sent_once_under_its_iteration():
    run = Run()
    writer = WandbWriter(run)
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
