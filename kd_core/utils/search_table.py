"""A table of trainings, configs/Search/*.yaml, and the results.json that tools/search.py fills from it.

A table names its `package`, the `teacher`, the number of `tries` of each method with their `design_seed`, `options` of
every student, the seed and options of the `search`, the seeds and options of the `test`, and the `methods`: each a
config, a `grid` of values to try, `teacher: False` for a plain student, and what is `published`.
"""

import hashlib
import itertools
import json
import random
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_core.utils.config import read_yaml
from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text

# package → command, metric in metrics.json, the teacher's file
PACKAGES = {
    "detection": (["tools/train_net.py"], "bbox/AP", "model_final.pth"),
    "segmentation": (["tools/train_net.py"], "sem_seg/mIoU", "model_final.pth"),
    "classification": (["-m", "kd_cls.train"], "val/top1", "last.pth"),
}
KEYS = ("package", "tries", "design_seed", "options", "teacher", "search", "test", "methods")
METHOD = {"config": str, "grid": dict, "teacher": bool, "published": object}  # key of a method → type of its value


@dataclass(frozen=True)
class Training:
    """One training of a table.

    Attributes:
        phase: "search" or "test".
        number: of the try.
        words: the try's own overrides, then those of its phase.
    """

    method: str
    phase: str
    number: int
    seed: int
    config: str
    words: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.method}/try{self.number}_seed{self.seed}"


@dataclass
class Results:
    """results.json: one entry for each finished training."""

    path: Path
    identity: dict[str, Any]
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self) -> None:
        """Take over the entries of an earlier call.

        Raises:
            UserError: the file is of another table, or of other options.
        """
        if not self.path.is_file():
            return
        found = json.loads(self.path.read_text(encoding="utf-8"))
        for name, value in self.identity.items():
            if found[name] != value:
                raise UserError(f"{self.path} is of another {name}: choose another --output, or remove its folder")
        self.entries = {entry["training"]: entry for entry in found["trainings"]}

    def check(self, key: str, config: str, words: Sequence[str], file_too: bool) -> None:
        """The entry of a training, where there is one, is of this config and these overrides.

        Args:
            file_too: the config's file, with its `_BASE_`, must set what it set then.

        Raises:
            UserError: it is of others.
        """
        if not (entry := self.entries.get(key)):
            return
        remedy = "remove this entry and its folder, or choose another --output"
        if (entry["config"], pairs(entry["overrides"])) != (config, pairs(words)):
            raise UserError(f"{self.path}: {key} was trained with other options than the table has now; {remedy}")
        if file_too and "config_digest" in entry and entry["config_digest"] != config_digest(config):
            raise UserError(f"{self.path}: {config}, or its _BASE_, has changed since {key} was trained; {remedy}")

    def add(self, entry: dict[str, Any]) -> None:
        with self.lock:
            self.entries[entry["training"]] = entry
            content = {**self.identity, "trainings": list(self.entries.values())}
            write_text(self.path, json.dumps(content, indent=1) + "\n")


def design(grid: dict[str, list[Any]], tries: int, seed: int, method: str) -> list[dict[str, Any]]:
    """`tries` points of a grid: the first value of every key, then others in a random order that `seed` determines.

    Raises:
        UserError: the grid has fewer points.
    """
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if len(points) < tries:
        raise UserError(f"methods.{method}.grid has {len(points)} points, fewer than the {tries} tries of each method")
    rest = points[1:]
    random.Random(f"{seed} {method}").shuffle(rest)
    return [points[0], *rest[: tries - 1]]


def words_of(options: dict[str, Any]) -> tuple[str, ...]:
    """KEY VALUE words of a command line."""
    return tuple(str(word) for pair in options.items() for word in pair)


def pairs(words: Sequence[str]) -> dict[str, str]:
    """What a command line's KEY VALUE words set: the last of equal keys counts."""
    return dict(zip(words[::2], words[1::2], strict=True))


def config_digest(config: str) -> str:
    """Of what a config's file sets, with its `_BASE_`."""
    return hashlib.sha256(json.dumps(read_yaml(config), sort_keys=True).encode()).hexdigest()[:16]


def read_table(path: Path) -> dict[str, Any]:
    """A table's yaml.

    Raises:
        UserError: no such file, a missing or unknown key, an unknown package, or a grid without lists of values.
    """
    if not path.is_file():
        raise UserError(f"TABLE: there is no file {path}")
    table = read_yaml(str(path))
    for what, keys in (("lacks", set(KEYS) - set(table)), ("has the unknown key", set(table) - set(KEYS))):
        if keys:
            raise UserError(f"{path} is no table: it {what} {', '.join(sorted(keys))}; a table has {', '.join(KEYS)}")
    if table["package"] not in PACKAGES:
        raise UserError(f"{path}: package is {table['package']!r}, expected {' or '.join(PACKAGES)}")
    if not isinstance(table["tries"], int) or table["tries"] < 1:
        raise UserError(f"{path}: tries is {table['tries']!r}, expected a whole number from 1")
    seeds = table["test"]["seeds"]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: test.seeds {seeds} has a seed twice")
    for name, method in table["methods"].items():
        check_method(f"{path}: methods.{name}", method)
    return table


def check_method(where: str, method: Any) -> None:
    """
    Raises:
        UserError: a method without a config, with an unknown key, or whose grid is not of lists.
    """
    if not isinstance(method, dict) or "config" not in method:
        raise UserError(f"{where} has no config")
    for key, value in method.items():
        if key not in METHOD or not isinstance(value, METHOD[key]):
            raise UserError(f"{where}.{key}: {value!r} is wrong or unknown; a method has {', '.join(METHOD)}")
    for key, values in method.get("grid", {}).items():
        if not isinstance(values, list) or not values:
            raise UserError(
                f"{where}.grid.{key} is {values!r}, expected a list of the values to try, as in [0.02, 0.01]"
            )
