"""Checkpoints: whole or absent, and nothing in them is executed."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kd_core.utils.errors import UserError
from kd_det.checkpoint.checkpointer import WholeCheckpointer, load_all_weights
from kd_det.config import kd_defaults
from kd_det.modeling.teacher.build import check_teacher_weights


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_executed",)


def test_a_checkpoint_comes_back_with_everything_in_it(tmp_path):
    model = nn.Linear(2, 3)
    WholeCheckpointer(model, str(tmp_path)).save("model_1", iteration=7)
    other = nn.Linear(2, 3)
    extra = WholeCheckpointer(other, str(tmp_path)).resume_or_load("", resume=True)
    assert extra["iteration"] == 7
    assert torch.equal(model.weight, other.weight)
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"


def test_weights_that_are_not_finite_never_become_the_last_checkpoint(tmp_path):
    model = nn.Linear(2, 3)
    checkpointer = WholeCheckpointer(model, str(tmp_path))
    checkpointer.save("model_1")
    model.bias.data[1] = float("nan")
    with pytest.raises(FloatingPointError, match=r"bias is not finite any more: no checkpoint model_2 is written"):
        checkpointer.save("model_2")
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth" and not (tmp_path / "model_2.pth").exists()


@pytest.mark.parametrize("suffix", ["pth", "pkl"])
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch, suffix):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"evil.{suffix}"
    if suffix == "pth":
        torch.save({"model": Evil()}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Evil()}))
    with pytest.raises(UserError, match=f"evil.{suffix} cannot be read as a checkpoint") as raised:
        WholeCheckpointer(nn.Linear(2, 3)).load(str(path))
    assert f"it refers to {os.system.__module__}.system" in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert not Path("was_executed").exists()


def test_a_model_zoo_pickle_of_numpy_arrays_loads(tmp_path):
    weights = {"weight": np.ones((3, 2), np.float32), "bias": np.zeros(3, np.float32)}
    path = tmp_path / "zoo.pkl"
    path.write_bytes(pickle.dumps({"model": weights, "__author__": "test"}, protocol=2))
    model = nn.Linear(2, 3)
    load_all_weights(model, str(path), "KD.TEACHER.WEIGHTS")
    assert model.weight.eq(1).all() and model.bias.eq(0).all()


def test_a_pycls_file_is_matched_by_its_names_endings(tmp_path):
    model = nn.ModuleDict({"backbone": nn.Linear(2, 3)})
    state = {"weight": torch.ones(3, 2), "bias": torch.zeros(3), "num_batches_tracked": torch.tensor(1)}
    torch.save({"epoch": 1, "model_state": state}, tmp_path / "net.pyth")
    load_all_weights(model, str(tmp_path / "net.pyth"), "MODEL.WEIGHTS")
    assert model["backbone"].weight.eq(1).all() and model["backbone"].bias.eq(0).all()


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "cut.pth"
    torch.save({"model": nn.Linear(2, 3).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(UserError, match=r"KEY: .*cut.pth cannot be read as a checkpoint: it is truncated"):
        load_all_weights(nn.Linear(2, 3), str(path), "KEY")


def test_a_teachers_missing_file_is_told_with_the_way_to_train_it(tmp_path):
    path = str(tmp_path / "model_final.pth")
    cfg = kd_defaults()
    cfg.KD.TEACHER.WEIGHTS = path
    told = rf"there is no file {path} \(tools/train_net.py with KD.TEACHER.CONFIG_FILE trains it\)"
    with pytest.raises(UserError, match=rf"^KD.TEACHER.WEIGHTS: {told}"):
        check_teacher_weights(cfg)
    with pytest.raises(UserError, match=rf"^MODEL.WEIGHTS: there is no file {path}$"):
        load_all_weights(nn.Linear(2, 3), path, "MODEL.WEIGHTS")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://localhost:9/w.pkl", r"http://localhost:9/w\.pkl cannot be downloaded \(.*refused"),
        ("nothing://w.pkl", r"nothing://w\.pkl is no address that detectron2 can download"),
    ],
)
def test_an_address_that_cannot_be_reached_is_named_with_its_key(url, message):
    with pytest.raises(UserError, match=f"MODEL.WEIGHTS: {message}") as raised:
        WholeCheckpointer(nn.Linear(2, 3), save_to_disk=False).load(url)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=f"KD.TEACHER.WEIGHTS: {message}"):
        load_all_weights(nn.Linear(2, 3), url, "KD.TEACHER.WEIGHTS")
