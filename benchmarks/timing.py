"""Times and peak memory of two ways to do the same thing, measured by turns."""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from kd_core.files import write_text

Step = Callable[[], object]


@dataclass
class Comparison:
    """One measured pair. Ratios are ours / theirs; a bound of None is reported and not judged."""

    name: str
    size: str
    ours_ms: float
    theirs_ms: float
    time_ratio: float
    time_bound: float | None = None
    memory_ratio: float | None = None
    memory_bound: float | None = None

    @property
    def holds(self) -> bool:
        pairs = ((self.time_ratio, self.time_bound), (self.memory_ratio, self.memory_bound))
        return all(ratio is None or bound is None or ratio <= bound for ratio, bound in pairs)


def alternate(ours: Step, theirs: Step, seconds: float = 1.0, least: int = 7) -> tuple[float, float, float]:
    """Milliseconds of either side and the ratio ours / theirs, each the median over pairs.

    The sides take turns, so that what else the machine does falls on both, and each pair gives one ratio.

    Args:
        ours, theirs: one step each.
        seconds: time to spend on pairs, after two that do not count.
        least: number of pairs even where they take longer.
    """
    pairs: list[tuple[float, float]] = []
    for _ in range(2):
        timed(ours), timed(theirs)
    end = time.perf_counter() + seconds
    while len(pairs) < least or time.perf_counter() < end:
        pairs.append((timed(ours), timed(theirs)))
    medians = [statistics.median(side) * 1e3 for side in zip(*pairs, strict=True)]
    return *medians, statistics.median(a / b for a, b in pairs)


def by_turns(sides: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round, after two that do not count.

    A side that has `times_itself` returns its seconds: what it must do before is then not in them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            seconds[name].append(side() if getattr(side, "times_itself", False) else timed(side))
    return {name: times[2:] for name, times in seconds.items()}


def timed(step: Step) -> float:
    """Seconds of one step, to its last kernel."""
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(step: Step) -> int:
    """The most memory that torch's allocator gives out at once during `step`, above what it gave out before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's remarks about itself
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, size in allocations:
        held += size
        peak = max(peak, held)
    return peak


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a table in Markdown; a figure above its bound is marked."""
    rows = []
    for c in comparisons:
        ratios = judged(c.time_ratio, c.time_bound), judged(c.memory_ratio, c.memory_bound)
        rows.append([c.name, c.size, c.ours_ms, c.theirs_ms, *ratios])
    headers = ["", "size", "ours, ms", "theirs, ms", "time ratio (bound)", "peak memory ratio (bound)"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=".2f")


def judged(ratio: float | None, bound: float | None) -> str:
    if ratio is None or bound is None:
        return "" if ratio is None else f"{ratio:.2f}"
    return f"{ratio:.2f} (≤ {bound})" + ("" if ratio <= bound else " **above**")


def write_json(path: Path, comparisons: Sequence[Comparison]) -> None:
    """The comparisons with the machine they were measured on."""
    write_figures(path, comparisons=[asdict(c) for c in comparisons])


def write_figures(path: Path, **figures: Any) -> None:
    """Figures with the machine they were measured on, written whole or not at all."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"torch": torch.__version__, "device": device, **figures}, indent=1))


def step_options(usage: str, peer: str) -> argparse.ArgumentParser:
    """The command line of a benchmark of training steps; `peer` says whose checkout `--peer` names."""
    parser = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help=f"a checkout of {peer}, read and never kept")
    parser.add_argument("--rounds", type=int, default=15, help="steps of every side that count")
    parser.add_argument("--json", type=Path, help="where the figures go")
    return parser


def report_steps(seconds: dict[str, list[float]], rows: list[list[Any]], path: Path) -> int:
    """Print the ratios and write the sides' milliseconds; 1 where a ratio is above its bound, else 0."""
    headers = ["", "ms", "floor or other side, ms", "ratio", "bound"]
    print(tabulate(rows, headers, tablefmt="github", floatfmt=".2f"))
    write_figures(path, milliseconds={name: 1e3 * statistics.median(times) for name, times in seconds.items()})
    return int(any(bound is not None and found > bound for *_, found, bound in rows))
