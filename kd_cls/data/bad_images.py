"""Training images that cannot be decoded: left out, where DATA.BAD_IMAGES says so."""

import logging
from typing import Any

from torch.utils.data import Dataset

from kd_cls.data.images import UnreadableImage
from kd_cls.data.wrapped import WrappedDataset
from kd_core.utils.errors import UserError

logger = logging.getLogger("kd_cls")

ON_BAD_IMAGE = ("error", "skip")


class SkipsUnreadable(WrappedDataset):
    """`dataset`, where the next image takes the place of one that cannot be decoded.

    Which one is a function of the index alone, so that a resumed training and a cache of the teacher's logits see the
    same samples. A file that is left out is logged once per process.
    """

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.logged: set[str] = set()

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)  # a loop over a data set ends by it
        for candidate in range(index, index + len(self)):
            try:
                return self.dataset[candidate % len(self)]
            except UnreadableImage as error:
                if str(error) not in self.logged:
                    self.logged.add(str(error))
                    logger.warning("DATA.BAD_IMAGES skip: left out: %s", error)
        raise UserError(f"DATA.BAD_IMAGES skip: not one of the {len(self)} training images can be decoded")
