"""Wrappers of a data set that keep its transform and classes."""

from typing import Any

from torch.utils.data import Dataset


class WrappedDataset(Dataset):
    """Base class: `dataset`, read in another way by a subclass."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @property
    def transform(self) -> Any:
        """The wrapped data set's transform; the loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    @property
    def classes(self) -> list[str]:
        """The wrapped data set's class names."""
        return self.dataset.classes

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(file, class index) of every image; an AttributeError where the wrapped data set has no files."""
        samples = self.dataset.samples
        return [samples[self.position(index)] for index in range(len(self))]

    def position(self, index: int) -> int:
        """The wrapped data set's index of an image."""
        return index

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.position(index)]


class EveryNth(WrappedDataset):
    """`count` evenly spaced images of a data set, so that sorted classes keep their shares."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        super().__init__(dataset)
        self.count = count

    def __len__(self) -> int:
        return self.count

    def position(self, index: int) -> int:
        return index * len(self.dataset) // self.count


class AllButEveryNth(WrappedDataset):
    """The images that `EveryNth(dataset, count)` leaves."""

    def __init__(self, dataset: Dataset, count: int) -> None:
        super().__init__(dataset)
        taken = {index * len(dataset) // count for index in range(count)}
        self.indices = [index for index in range(len(dataset)) if index not in taken]

    def __len__(self) -> int:
        return len(self.indices)

    def position(self, index: int) -> int:
        return self.indices[index]
