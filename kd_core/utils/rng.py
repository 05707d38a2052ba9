"""The random generators of the CPU that data pipelines draw from: python's, numpy's and torch's, kept and seeded."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Afterwards python's, numpy's and torch's CPU generators are where they were before.

    All three, because torchvision's transforms draw from torch, timm's from python and numpy, detectron2's from numpy.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (what they draw from)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def seed_rng(seed: int) -> None:
    """Start those three generators from `seed` ≥ 0. (`torch.manual_seed` would reseed the GPU too.)"""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
