"""DeepKD killed in the middle of a step and started again: the same trajectory, to the bit."""

import os
import signal
import sys
from pathlib import Path

import torch

from helpers import HELPERS
from helpers.processes import run

WORKER = HELPERS / "resumable.py"
STEPS = 40


def train(folder: Path, *die_at: int) -> int:
    """The exit code of a training, which is killed in step `die_at`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, WORKER, folder, STEPS, *die_at]
    return run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode


def test_training_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Killed before `momenta: auto` has set the momenta, at 16, and after."""
    assert train(tmp_path / "undisturbed") == 0
    for die_at in (9, 27):
        assert train(tmp_path / "killed", die_at) == -signal.SIGKILL
        assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == die_at
    assert train(tmp_path / "killed") == 0
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("undisturbed", "killed")]
    assert ends[0]["momenta"] == ends[1]["momenta"] is not None
    assert all(torch.equal(p, q) for p, q in zip(ends[0]["parameters"], ends[1]["parameters"], strict=True))
