"""What every test may use: one seed, and the way to the optional real data."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data that some tests read: `KD_SHARED`, by default `../shared`. Tests that ask for it skip
    without it.
    """
    path = Path(os.environ.get("KD_SHARED", ROOT.parent / "shared")).resolve()
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set KD_SHARED to the folder that holds it")
    return path
