"""Seeding and restoring the CPU random generators that data pipelines draw from: python's, numpy's and torch's."""

import hashlib
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


def mix_seed(*values: int) -> int:
    """One 63-bit seed from several integers; neighbouring integers give unrelated seeds."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix_seed_32(*values: int) -> int:
    """As `mix_seed`, by numpy's SeedSequence to 32 bits: what detectors have drawn from since the first version."""
    return int(np.random.SeedSequence(values).generate_state(1)[0])
