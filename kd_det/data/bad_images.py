"""Image files that cannot be decoded in the middle of a run: named, or, in training, skipped (DATASETS.BAD_IMAGES)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data.detection_utils import check_image_size, read_image
from torch.utils.data import DataLoader, Dataset

from kd_core.utils.errors import UserError, one_line

logger = logging.getLogger(__name__)

ON_BAD_IMAGE = ("error", "skip")
CHECK_DATA = "tools/check_data.py lists all such files and writes a json without them"


def check_on_bad_image(value: str) -> None:
    """Raise a UserError for a DATASETS.BAD_IMAGES that is none of `ON_BAD_IMAGE`."""
    if value not in ON_BAD_IMAGE:
        raise UserError(f"DATASETS.BAD_IMAGES is {value!r}: expected {' or '.join(ON_BAD_IMAGE)}")


@dataclass(frozen=True)
class BadImage:
    """What a worker sends in the place of a sample; an exception would reach the user as its forty-line traceback."""

    message: str

    @staticmethod
    def refuse(batch: Sequence[Any]) -> None:
        """Raise a UserError in the main process if a sample of the batch is a BadImage."""
        for sample in batch:
            if isinstance(sample, BadImage):
                raise UserError(sample.message)


class NamedBadImages(Dataset):
    """`dataset`, where an image that cannot be decoded is named, or replaced by the next one that can.

    The replacement is a function of the index alone, so that a resumed training sees the same samples. An error that
    has another cause than the image file is raised as it is.

    Args:
        dataset: maps a record to a sample.
        records: detectron2's dataset dicts, with a `file_name` each.
        on_bad_image: "error" or "skip"; a skipped file is logged once per process.
    """

    def __init__(self, dataset: Dataset, records: Sequence[dict[str, Any]], on_bad_image: str) -> None:
        self.dataset, self.records, self.on_bad_image = dataset, records, on_bad_image
        self.logged: set[str] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        for candidate in range(index, index + len(self)):
            try:
                return self.dataset[candidate % len(self)]
            except UserError as error:  # names its own file: a label map
                return BadImage(str(error))
            except Exception:
                record = self.records[candidate % len(self)]
                reason = why_unreadable(record)
                if reason is None:
                    raise
            if self.on_bad_image == "error":
                return BadImage(
                    f"{record['file_name']} cannot be used: {reason}. {CHECK_DATA}; DATASETS.BAD_IMAGES skip leaves "
                    "them out"
                )
            if record["file_name"] not in self.logged:
                self.logged.add(record["file_name"])
                logger.warning("DATASETS.BAD_IMAGES skip: %s is left out: %s", record["file_name"], reason)
        return BadImage(f"DATASETS.BAD_IMAGES skip: not one of the {len(self)} images can be decoded")


class NamedTestImages:
    """The mapper of a test set, where an image that cannot be decoded is named. None is skipped: an AP is of them all.

    Args:
        mapper: maps a record to a sample.
    """

    def __init__(self, mapper: Callable[[dict[str, Any]], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict[str, Any]) -> Any:
        try:
            return self.mapper(record)
        except Exception:
            reason = why_unreadable(record)
            if reason is None:
                raise
        return BadImage(f"{record['file_name']} cannot be used: {reason}. {CHECK_DATA}")


class TestLoader:
    """The batches of `loader`, up to one with a BadImage: there it raises the UserError."""

    __test__ = False  # to pytest

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.loader:
            BadImage.refuse(batch)
            yield batch


def why_unreadable(record: dict[str, Any]) -> str | None:
    """What is wrong with the image file of a record; None where it can be read and has the size that is expected."""
    try:
        check_image_size(dict(record), read_image(record["file_name"]))
    except Exception as error:  # PIL raises many kinds, SyntaxError among them
        return one_line(error)
    return None
