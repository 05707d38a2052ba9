"""DeepKD killed in the middle of a step and started again: the same trajectory, to the bit."""

from pathlib import Path

import torch

from helpers import HELPERS, forked


def test_training_that_was_killed_resumes_to_the_bit(tmp_path: Path) -> None:
    """Killed before `momenta: auto` has set the momenta, at 16, and after."""
    done = forked.run([HELPERS / "resumable.py", tmp_path, 40, 9, 27])
    assert done.stdout.splitlines() == ["undisturbed 0 40", "killed -9 9", "killed -9 27", "killed 0 40"], done.stderr
    ends = [torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("undisturbed", "killed")]
    assert ends[0]["momenta"] == ends[1]["momenta"] is not None
    assert all(torch.equal(p, q) for p, q in zip(ends[0]["parameters"], ends[1]["parameters"], strict=True))
