"""Augmentation as a pure function of (seed, epoch, index), for any workers, for --resume and for teacher caches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from kd_cls.data.wrapped import WrappedDataset
from kd_core.utils.rng import mix_seed, preserved_rng, seed_rng


class ReproducibleDataset(WrappedDataset):
    """`dataset`, with every random choice made in `dataset[index]` drawn from (seed, epoch, index).

    Args:
        dataset: any map-style data set.
        seed: of the augmentation.
        augmentation_epochs: after how many epochs the augmentations repeat; 0: never.
    """

    def __init__(self, dataset: Dataset, seed: int, augmentation_epochs: int = 0) -> None:
        super().__init__(dataset)
        self.seed, self.augmentation_epochs = seed, augmentation_epochs
        # In shared memory: persistent workers hold a copy of this object from the first epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Draw from `epoch` from now on, in every worker too. Call it between epochs, because workers prefetch."""
        self._epoch.fill_(epoch % self.augmentation_epochs if self.augmentation_epochs else epoch)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch at once: saving the generators' states takes longer than a crop."""
        epoch, items = int(self._epoch), []
        with preserved_rng():
            for index in indices:
                seed_rng(mix_seed(self.seed, epoch, int(index)))
                items.append(self.dataset[index])
        return items
