"""The JSON file of a benchmark: its tables and bounds, and the machine, commit and command that gave them."""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from kd_core.utils.files import write_text
from kd_core.utils.run_info import processor

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "output" / "bench"
PACKAGES = ("torch", "torchvision", "timm", "detectron2")


@dataclass
class Table:
    """Rows of text and numbers; `str` gives Markdown."""

    headers: list[str]
    rows: list[list[Any]]

    def __str__(self) -> str:
        cells = [[cell(value) for value in row] for row in self.rows]
        align = ["left"] + ["right"] * (len(self.headers) - 1) if cells else None
        return tabulate(cells, self.headers, tablefmt="github", disable_numparse=True, colalign=align)


@dataclass
class Bound:
    """A figure and its upper bound."""

    name: str
    found: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.found <= self.bound  # and a NaN holds no bound

    def __str__(self) -> str:
        return f"{self.name}: {judged(self.found, self.bound)}"


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def judged(found: float | None, bound: float | None, digits: int = 2) -> str:
    """A figure with its bound, marked where it exceeds it. A bound of None: reported, not judged."""
    if found is None or bound is None:
        return "" if found is None else f"{found:.{digits}f}"
    return f"{found:.{digits}f} (≤ {bound:g})" + ("" if found <= bound else " **above**")


def write_figures(path: Path, tables: Mapping[str, Table], bounds: Sequence[Bound] = (), **figures: Any) -> int:
    """Write a benchmark's file, whole or not at all.

    Args:
        path: `<name of the benchmark>.json`.
        tables: by the names that docs/performance.md gives them (report.py).
        bounds: what was judged.
        figures: further figures to keep.
    Returns:
        The exit code: 1 where a bound does not hold, else 0.
    """
    content = {
        "machine": machine(),
        "commit": commit(),
        "command": command(sys.argv),
        "tables": {name: asdict(table) for name, table in tables.items()},
        "bounds": [asdict(bound) for bound in bounds],
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1))
    return int(not all(bound.holds for bound in bounds))


def machine() -> dict[str, Any]:
    """The machine and the versions that the figures are measured with."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: installed(name) for name in PACKAGES},
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str:
    """The checkout's commit; `-dirty` where tracked files differ from it. Empty outside a git checkout."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def command(words: Sequence[str]) -> str:
    """The command line without --json; paths outside of the checkout are shortened to their last part."""
    shown = []
    for before, word in zip(["", *words], words, strict=False):
        if "--json" in (before, word):
            continue
        path = Path(word)
        if path.is_absolute():
            word = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"…/{path.name}"
        shown.append(word if word.startswith("…") else shlex.quote(word))
    return " ".join(["python", *shown])


def options(usage: str, name: str) -> argparse.ArgumentParser:
    """The options of every benchmark, which has one thread unless OMP_NUM_THREADS says otherwise: with all cores its
    ratios would tell what else the machine does. A run by hand writes to another folder than run.py."""
    torch.set_num_threads(int(os.getenv("OMP_NUM_THREADS", "1")))
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = OUTPUT / "by_hand" / f"{name}.json"
    parser.add_argument("--json", type=Path, default=default, help="where the figures go (%(default)s)")
    return parser


def step_options(usage: str, name: str, peer: str) -> argparse.ArgumentParser:
    """The options of a benchmark of training steps; `peer` describes the checkout that `--peer` names."""
    parser = options(usage, name)
    parser.add_argument("--peer", type=Path, help=f"a checkout of {peer}, to compare with")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps per side")
    return parser


def parts_of_step(whole: Sequence[float], parts: Mapping[str, Sequence[float]]) -> Table:
    """The parts of a step: medians over the rounds, shares of the whole, and the unmeasured rest."""
    total = statistics.median(whole)
    medians = {name: statistics.median(seconds) for name, seconds in parts.items()}
    medians |= {"the rest": total - sum(medians.values()), "the whole step": total}
    rows = [[name, 1e3 * seconds, f"{seconds / total:.1%}"] for name, seconds in medians.items()]
    return Table(["DeepKD's step", "ms", "share"], rows)


def report_steps(seconds: dict[str, list[float]], rows: list[list[Any]], path: Path, parts: Table) -> int:
    """Print and write a benchmark of steps; the exit code.

    Args:
        seconds: for each side, one per round.
        rows: [name, ms, ms of the other side, ratio, bound or None].
        path: of the JSON file.
        parts: the table of `parts_of_step`.
    """
    milliseconds = {name: 1e3 * statistics.median(times) for name, times in seconds.items()}
    ratios = [[name, ours, other, judged(found, bound)] for name, ours, other, found, bound in rows]
    tables = {
        "ratios": Table(["", "ms", "floor or other side, ms", "ratio (bound)"], ratios),
        "sides": Table(["", "ms"], [list(side) for side in milliseconds.items()]),
        "parts": parts,
    }
    print(tables["ratios"], parts, sep="\n\n")
    bounds = [Bound(name, found, bound) for name, *_, found, bound in rows if bound is not None]
    return write_figures(path, tables, bounds, milliseconds=milliseconds)
