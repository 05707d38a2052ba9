"""Times and peak memory of two ways to do the same thing, measured in turn."""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from figures import Bound, Table, judged
from torch.profiler import ProfilerActivity, profile

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
    def bounds(self) -> list[Bound]:
        """The bounds that are judged."""
        name = f"{self.name}, {self.size}"
        pairs = ((name, self.time_ratio, self.time_bound), (f"{name}, memory", self.memory_ratio, self.memory_bound))
        return [Bound(name, ratio, bound) for name, ratio, bound in pairs if ratio is not None and bound is not None]


def alternate(ours: Step, theirs: Step, seconds: float = 1.0, least: int = 7) -> tuple[float, float, float]:
    """Milliseconds of both sides and the ratio ours / theirs, each the median over pairs.

    The sides take turns, so that other load on the machine affects both, and each pair gives one ratio.

    Args:
        ours, theirs: one step each.
        seconds: time to spend on pairs, after two warm-up pairs.
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
    """Seconds of every side in every round, after two warm-up rounds.

    A side with the attribute `times_itself` returns its own seconds, without its preparation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, side in sides.items():
            seconds[name].append(side() if getattr(side, "times_itself", False) else timed(side))
    return {name: times[2:] for name, times in seconds.items()}


def timed(step: Step, clock: Callable[[], float] | None = None) -> float:
    """Seconds of one step, to its last kernel; in one thread on a CPU those of this process, whatever else runs."""
    if clock is None:
        alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
        clock = time.process_time if alone else time.perf_counter
    if torch.cuda.is_available():  # what was queued before is not the step's
        torch.cuda.synchronize()
    start = clock()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def peak_bytes(step: Step) -> int:
    """Peak memory of torch's allocator during `step`, above what was allocated before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    allocations = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = peak = 0
    for _, size in allocations:
        held += size
        peak = max(peak, held)
    return peak


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """The comparisons as a table; a figure above its bound is marked."""
    rows = []
    for c in comparisons:
        ratios = judged(c.time_ratio, c.time_bound), judged(c.memory_ratio, c.memory_bound)
        rows.append([c.name, c.size, c.ours_ms, c.theirs_ms, *ratios])
    return Table(["", "size", "ours, ms", "theirs, ms", "time ratio (bound)", "peak memory ratio (bound)"], rows)
