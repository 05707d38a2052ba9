"""Two gloo processes under torchrun: equal parameters, and the gradient of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from .conftest import make_batch
from .two_ranks import gradients

HERE = Path(__file__).resolve().parent


@pytest.fixture
def unpinned(monkeypatch):
    """What `gradients` pins is put back after the test."""
    from detectron2.modeling.proposal_generator import proposal_utils

    monkeypatch.setattr(torch, "randperm", torch.randperm)
    monkeypatch.setattr(proposal_utils, "batched_nms", proposal_utils.batched_nms)


def test_two_ranks_end_with_equal_parameters_and_step_by_one_process_gradient(tiny_cfg, tmp_path, unpinned):
    cfg = tiny_cfg(
        "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.005,
        "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()",
        "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
    )  # fmt: skip
    (tmp_path / "output").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "two_ranks.py"), str(config), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    trained = [name for name in first["parameters"] if "running" not in name and "num_batches" not in name]
    assert all(torch.equal(first["parameters"][name], second["parameters"][name]) for name in trained)
    alone = gradients(cfg, make_batch(8))
    assert alone.keys() == first["gradients"].keys()
    for name, gradient in alone.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        assert_close(first["gradients"][name], gradient, rtol=0, atol=1e-10)
