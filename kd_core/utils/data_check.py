"""What is wrong with a data set, kind by kind: how often, and where first."""

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")
Result = TypeVar("Result")

SHOWN = 3  # places named of each kind


@dataclass
class DataReport:
    """Problems and remarks about a data set.

    Attributes:
        problems: kind → every place of it; training would fail on it, or learn or measure something wrong.
        remarks: kind → every place of it; allowed, and worth knowing.
    """

    problems: dict[str, list[str]] = field(default_factory=dict)
    remarks: dict[str, list[str]] = field(default_factory=dict)

    def problem(self, kind: str, place: str) -> None:
        self.problems.setdefault(kind, []).append(place)

    def remark(self, kind: str, place: str) -> None:
        self.remarks.setdefault(kind, []).append(place)

    def lines(self) -> list[str]:
        """One line per kind, problems first."""
        wrong = [f"WRONG   {summary(kind, places)}" for kind, places in self.problems.items()]
        return wrong + [f"remark  {summary(kind, places)}" for kind, places in self.remarks.items()]


def summary(kind: str, places: Sequence[str]) -> str:
    """`kind (count): the first places`."""
    more = f", and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return f"{kind} ({len(places)}): {'; '.join(places[:SHOWN])}{more}"


def in_parallel(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int = 0,
) -> list[Result]:
    """`[function(item) for item in items]` by threads, since image decoders release the interpreter's lock.

    A terminal has a progress bar on stderr.

    Args:
        workers: threads; 0 takes one per core.
    """
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        results = pool.map(function, items)
        return list(tqdm(results, total=len(items), unit="image", leave=False, disable=None))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes: equal files are the same image."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def report_shared(report: DataReport, digests: dict[str, dict[str, Any]]) -> None:
    """Report each file of one split that is also in another split.

    Args:
        digests: split → {digest: file}.
    """
    splits = list(digests.items())
    for index, (split, files) in enumerate(splits):
        for other, theirs in splits[index + 1 :]:
            for digest in files.keys() & theirs.keys():
                place = f"{files[digest]} of {split} is {theirs[digest]} of {other}"
                report.problem("the same image in two splits", place)
