"""Augmentation as a pure function of (seed, epoch, index), which workers, resuming and teacher caches can rely on."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


def mix_seed(*values: int) -> int:
    """One 63-bit seed from several integers; neighbouring integers give unrelated seeds."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded_rng(*values: int) -> Iterator[None]:
    """Inside, python's, numpy's and torch's CPU generators start from `values`; afterwards they are where they were.

    All three, because torchvision's transforms draw from torch and timm's from python and numpy. Not `torch.manual_seed`,
    which would reseed the GPU too.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  (what timm draws from)
    seed = mix_seed(*values)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


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
        with seeded_rng(self.seed, int(self._epoch), index):
            return self.dataset[index]

    def __len__(self) -> int:
        return len(self.dataset)
