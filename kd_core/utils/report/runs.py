"""Trainings read from their OUTPUT_DIR: config.yaml, metrics.json and run.json; seeds of one method make a group."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_core.utils.config import read_yaml
from kd_core.utils.errors import UserError
from kd_core.utils.run_info import EVALUATION, read_run_info

LOSSES = {"kd": "KD", "dkd": "DKD", "gdkd": "GDKD", "gdkd3": "GDKD3", "gdkds": "GDKDS", "aekt": "AEKT"}
LOSSES |= {"dist": "DIST", "mlkd": "MLKD", "crld": "CRLD", "review": "ReviewKD"}
OPTIMIZERS = {"deepkd_sgd": "DeepKD ({})", "dot_sgd": "DOT ({})", "stream_adamw": "{}, StreamAdamW"}
EVALUATED = ("bbox", "segm", "keypoints", "sem_seg", "panoptic_seg")  # as detectron2's evaluators call their results
# Runs that differ in these keys only are repetitions of one method.
REPETITION = (
    ("SEED",), ("SEEDS",), ("OUTPUT_DIR",), ("KD", "TEACHER", "WEIGHTS"), ("DATALOADER", "NUM_WORKERS"),
    ("train", "seed"), ("train", "output_dir"), ("model", "teacher", "weights"),  # of LazyConfigs
)  # fmt: skip


@dataclass
class Run:
    """One training, finished or not.

    Attributes:
        folder: its OUTPUT_DIR.
        config: config.yaml.
        lines: of metrics.json, in the order in which they were written.
        info: run.json; {} for trainings that are older than it; of an evaluation alone its evaluation.json.
        max_iter: iterations of the schedule; 0 where the package that trained it has not said.
        title: of its method; the same for all seeds of it.
        role: "teacher", "plain" or "student".
    """

    folder: Path
    config: dict[str, Any]
    lines: list[dict[str, Any]]
    info: dict[str, Any] = field(default_factory=dict)
    max_iter: int = 0
    title: str = ""
    role: str = "student"

    @property
    def name(self) -> str:
        """The folder's name; for a seed of several its parent's before it."""
        folder = self.folder
        return f"{folder.parent.name}/{folder.name}" if folder.name.startswith("seed_") else folder.name

    @property
    def seed(self) -> int | None:
        return self.config.get("SEED")

    @property
    def iteration(self) -> int:
        """The last iteration in metrics.json; -1 where there is none."""
        return max((line["iteration"] for line in self.lines), default=-1)

    def scalars(self) -> list[str]:
        """Every key of metrics.json that has a number, in order of appearance."""
        return list(dict.fromkeys(key for line in self.lines for key, value in line.items() if is_number(value)))

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values of `key`."""
        points = [(line["iteration"], line[key]) for line in self.lines if is_number(line.get(key))]
        return [x for x, _ in points], [float(y) for _, y in points]

    def last(self, key: str) -> float | None:
        """The last value of `key`; None where there is none."""
        values = self.series(key)[1]
        return values[-1] if values else None

    def is_finished(self, metric: str) -> bool:
        """Whether the schedule is at its end and `metric` was evaluated there (detectron2 counts from 0)."""
        evaluated = self.series(metric)[0]
        return bool(evaluated) and (self.evaluated or evaluated[-1] + 1 >= self.max_iter > 0)

    @property
    def evaluated(self) -> str:
        """The weights of an evaluation without a training; empty for a training."""
        return self.info.get("evaluated", "")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.json; a line that a running training has not finished is left out."""
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int):
            lines.append(line)
    return lines


def read_run(folder: Path) -> Run:
    """The training in `folder`, or the evaluation where there is no training.

    Raises:
        UserError: there is no config.yaml.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no OUTPUT_DIR of a training: it has no config.yaml")
    config, lines = with_common_keys(read_yaml(str(path))), read_lines(folder / "metrics.json")
    evaluation = read_run_info(folder, EVALUATION)
    if evaluation and not lines:
        return Run(folder, config, [{"iteration": 0, **evaluation.pop("results", {})}], evaluation)
    return Run(folder, config, lines, read_run_info(folder))


def with_common_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A config.yaml; of a LazyConfig also under the keys that a report reads."""
    if "dataloader" not in config:
        return config
    loss, names = lookup(config, "model", "loss") or {}, lookup(config, "dataloader", "test", "dataset", "names")
    name = loss.get("_target_", "none").rpartition(".")[2].removesuffix("Loss").lower()
    feature = "none" if lookup(config, "model", "feature") is None else "feature loss"
    optimizer = lookup(config, "optimizer", "_target_", default="").rpartition(".")[2]
    preset = "released" if optimizer.endswith("_released") else lookup(config, "optimizer", "preset", default="paper")
    return {
        **config,
        "KD": {
            "LOSS": {"NAME": name, "TOPK": {"ENABLED": bool(loss.get("topk"))}},
            "FEATURE": {"NAME": feature},
            "TEACHER": {"WEIGHTS": lookup(config, "model", "teacher", "weights")},
        },
        "SOLVER": {
            "MAX_ITER": lookup(config, "train", "max_iter", default=0),
            "OPTIMIZER": optimizer.removesuffix("_released"),
            "DEEPKD": {"PRESET": preset},
        },
        "DATASETS": {"TEST": [names] if isinstance(names, str) else names or []},
        "SEED": lookup(config, "train", "seed"),
        "OUTPUT_DIR": lookup(config, "train", "output_dir"),
    }


def lookup(config: dict[str, Any], *keys: str, default: Any = None) -> Any:
    """A value in nested dicts."""
    for key in keys:
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def method_title(config: dict[str, Any]) -> str:
    """The method as the papers' tables call it: "plain", "DKD", "DeepKD (DKD), released momenta, mask"."""
    names = (lookup(config, "KD", part, "NAME", default="none") for part in ("LOSS", "FEATURE"))
    losses = [LOSSES.get(name, name) for name in names if name != "none"]
    if not losses:
        return "plain"
    optimizer = lookup(config, "SOLVER", "OPTIMIZER")
    title = OPTIMIZERS.get(optimizer, "{}").format(" + ".join(losses))
    if optimizer == "deepkd_sgd" and lookup(config, "SOLVER", "DEEPKD", "PRESET") == "released":
        title += ", released momenta"
    return title + (", mask" if lookup(config, "KD", "LOSS", "TOPK", "ENABLED") else "")


def method_identity(config: dict[str, Any]) -> str:
    """Equal for runs that differ in `REPETITION` only."""
    config = json.loads(json.dumps(config))
    for *path, last in REPETITION:
        (lookup(config, *path) or {}).pop(last, None)
    return json.dumps(config, sort_keys=True)


def assign_roles(runs: Iterable[Run]) -> list[Run]:
    """Give every run its role and title, and put the teachers first, then plain training, then the students.

    A teacher is a run whose weights another one learns from, or whose folder is called so. Methods that differ in more
    than the seed have different titles: the end of the folder's path tells them apart.
    """
    runs = list(runs)
    teachers = {teacher for run in runs if (teacher := teacher_folder(run)) is not None}
    for run in runs:
        plain = method_title(run.config) == "plain"
        if run.folder.resolve() in teachers or (plain and run.folder.name.startswith("teacher")):
            run.role = "teacher"
        else:
            run.role = "plain" if plain else "student"
        run.title = "teacher" if run.role == "teacher" else method_title(run.config)
    methods: dict[str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        methods[run.title][method_identity(run.config)].append(run)
    for groups in methods.values():
        for identity, group in list(groups.items()):
            if repeats_a_seed(group) and len({teacher_folder(run) for run in group}) > 1:
                del groups[identity]
                for run in group:
                    groups[f"{identity} {teacher_folder(run)}"].append(run)
    for title, by_identity in methods.items():
        if len(by_identity) > 1:
            groups = list(by_identity.values())
            for group, name in zip(groups, distinct_names([group[0].folder for group in groups]), strict=True):
                for run in group:
                    run.title = f"{title} [{name}]"
    order = ("teacher", "plain", "student")
    return sorted(runs, key=lambda run: order.index(run.role))


def repeats_a_seed(runs: Sequence[Run]) -> bool:
    """Whether two runs have the same seed: then they are no repetitions, which may have teachers of their own."""
    seeds = [run.seed for run in runs if run.seed is not None and run.seed >= 0]
    return len(set(seeds)) < len(seeds)


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """As many last parts of the paths as it takes to tell them apart: the names, where these differ."""
    names: list[str] = []
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{name} {number}" for number, name in enumerate(names, 1)]  # of one folder, at different times


def teacher_folder(run: Run) -> Path | None:
    """The folder of the weights that taught `run`; None for plain training and several teachers.

    A classifier's teacher may be named by its config alone, whose OUTPUT_DIR holds the weights.
    """
    teacher = lookup(run.config, "KD", "TEACHER", default={})
    if method_title(run.config) == "plain":
        return None
    if weights := teacher.get("WEIGHTS"):
        return Path(weights).parent.resolve()
    if Path(teacher.get("CONFIG_FILE", "")).is_file():
        output = read_yaml(teacher["CONFIG_FILE"]).get("OUTPUT_DIR")
        return Path(output).resolve() if output else None
    return None


def by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each method, in order."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.title].append(run)
    return dict(groups)


def complete_groups(runs: Iterable[Run], metric: str) -> dict[str, list[Run]]:
    """`by_title`, without the unfinished runs of a method that has finished ones: a mean is of whole trainings."""
    groups = by_title(runs)
    return {title: [run for run in group if run.is_finished(metric)] or group for title, group in groups.items()}


def finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]
