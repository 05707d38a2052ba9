"""A part of a data set, for short runs."""

from typing import Any

from torch.utils.data import Dataset, Subset


class EvenSubset(Subset):
    """`count` images evenly spaced over `dataset`: of a folder sorted by class, about as many of each class.

    Raises:
        ValueError: `count` is negative or more than there are.
    """

    def __init__(self, dataset: Dataset, count: int) -> None:
        if not 1 <= count <= len(dataset):
            raise ValueError(f"cannot take {count} of {len(dataset)} images: use a number in between, or 0 for all")
        super().__init__(dataset, [index * len(dataset) // count for index in range(count)])

    @property
    def transform(self) -> Any:
        """The whole data set's transform; timm's loader sets it."""
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    @property
    def classes(self) -> list[str]:
        """The whole data set's class names, also of classes without an image in this part."""
        return self.dataset.classes
