"""DeepKD killed in the middle of a step and started again: the same trajectory, to the bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

from helpers import HELPERS

WORKER = HELPERS / "resumable.py"
STEPS = 40


def start(folder: Path, *die_at: int) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), str(folder), str(STEPS), *map(str, die_at)]
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_training_that_was_killed_goes_on_to_the_bit(tmp_path: Path) -> None:
    """Killed before `momenta: auto` has set the momenta, at 16, and after."""
    undisturbed = start(tmp_path / "undisturbed")
    for die_at in (9, 27):
        assert start(tmp_path / "killed", die_at).wait(300) == -signal.SIGKILL
        assert torch.load(tmp_path / "killed" / "last.pt", weights_only=True)["step"] == die_at
    assert start(tmp_path / "killed").wait(300) == undisturbed.wait(300) == 0
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("undisturbed", "killed")]
    assert ends[0]["momenta"] == ends[1]["momenta"] is not None
    assert all(torch.equal(p, q) for p, q in zip(ends[0]["parameters"], ends[1]["parameters"], strict=True))
