"""Augmentation as a pure function of (seed, epoch, index), which workers, resuming and teacher caches can rely on."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info


def mix_seed(*values: int) -> int:
    """One 63-bit seed from several integers; neighbouring integers give unrelated seeds."""
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded_rng(*values: int) -> Iterator[None]:
    """Inside, python's, numpy's and torch's CPU generators start from `values`; afterwards they are where they were.

    All three, because torchvision's transforms draw from torch and timm's from python and numpy. Not by
    `torch.manual_seed`, which would reseed the GPU too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (what timm draws from)
    try:
        _seed_all(mix_seed(*values))
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)


class ReproducibleDataset(Dataset):
    """`dataset`, with every random choice made in `dataset[index]` drawn from (seed, epoch, index).

    Args:
        dataset: any map-style data set.
        seed: of the augmentation.
        augmentation_epochs: after how many epochs the same augmentations come again; 0: never.
    """

    def __init__(self, dataset: Dataset, seed: int, augmentation_epochs: int = 0) -> None:
        self.dataset, self.seed, self.augmentation_epochs = dataset, seed, augmentation_epochs
        # Shared memory: workers that live through several epochs were given a copy of this object in the first.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def transform(self) -> Any:
        """The wrapped data set's transform; timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    @property
    def classes(self) -> list[str]:
        """The wrapped data set's class names."""
        return self.dataset.classes

    def set_epoch(self, epoch: int) -> None:
        """Draw from `epoch` from now on, in every worker too. Call it between epochs: workers fetch ahead."""
        self._epoch.fill_(epoch % self.augmentation_epochs if self.augmentation_epochs else epoch)

    def __getitem__(self, index: int) -> Any:
        origin = self.seed, int(self._epoch), int(index)
        if get_worker_info() is not None:  # a worker draws from nothing else: no state to keep (20 times cheaper)
            _seed_all(mix_seed(*origin))
            return self.dataset[index]
        with seeded_rng(*origin):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)
