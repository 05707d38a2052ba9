"""Every benchmark, one after the other:  python benchmarks/run.py [--quick] [--only NAME …]

Each writes its figures to output/bench/<name>.json; report.py writes them into docs/performance.md. All of them run,
also after a failure; exit code 1 if one failed or missed a bound. Environment variables:

    PEER_DEEPKD, PEER_MDISTILLER    checkouts of the papers' code, to be compared with ours
    IMAGES_JSON, IMAGES_DIR         a data set in COCO's format, for the loader's share

Nothing else should run on the machine. --quick only checks that everything runs: few rounds, small sizes, bounds that
do not count. Its figures, in output/bench/quick, mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from figures import OUTPUT, ROOT, Bound, Table


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder: its arguments for --quick and for a full run, and options that the environment sets."""

    name: str
    quick: tuple[str, ...] = ()
    full: tuple[str, ...] = ()
    from_environment: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def words(self, quick: bool, environment: Mapping[str, str]) -> list[str]:
        """Its arguments. An option is left out unless all its variables are set."""
        words = list(self.quick if quick else self.full)
        for option, variables in self.from_environment:
            values = [environment.get(variable, "") for variable in variables]
            if all(values):
                words += [option, *values]
        return words


BENCHMARKS = (
    Benchmark("core", quick=("--seconds", "0.01")),
    Benchmark("kd_cls_step", ("--rounds", "1"), from_environment=(("--peer", ("PEER_DEEPKD",)),)),
    Benchmark("kd_det_step", ("--rounds", "1"), from_environment=(("--peer", ("PEER_MDISTILLER",)),)),
    Benchmark("kd_dense_step", ("--rounds", "1", "--size", "128")),
    Benchmark("kd_seg_step", ("--rounds", "1", "--size", "64")),
    Benchmark("share", quick=("--rounds", "1")),
    Benchmark("growth", quick=("--quick",)),
    Benchmark(
        "kd_det_loader",
        ("--rounds", "1", "--mapped", "20"),
        from_environment=(("--images", ("IMAGES_JSON", "IMAGES_DIR")),),
    ),
    Benchmark("memory"),
)


@dataclass
class Outcome:
    """The result of one benchmark; `bounds` is None if it wrote no figures."""

    name: str
    seconds: float
    bounds: list[Bound] | None

    @property
    def holds(self) -> bool:
        return self.bounds is not None and all(bound.holds for bound in self.bounds)

    def row(self) -> list[str]:
        if self.bounds is None:
            return [self.name, f"{self.seconds:.0f}", "failed", ""]
        missed = [str(bound) for bound in self.bounds if not bound.holds]
        return [
            self.name,
            f"{self.seconds:.0f}",
            f"{len(self.bounds) - len(missed)} of {len(self.bounds)}",
            "; ".join(missed),
        ]


def run_one(name: str, words: Sequence[str], folder: Path, scripts: Path) -> Outcome:
    """Run one script; its figures count only if this run wrote them."""
    path = folder / f"{name}.json"
    path.unlink(missing_ok=True)
    print(f"\n== {name} {' '.join(words)}\n", flush=True)
    start = time.perf_counter()
    # The figures decide: exit code 1 may mean a missed bound or a traceback.
    subprocess.run([sys.executable, str(scripts / f"{name}.py"), *words, "--json", str(path)], cwd=ROOT, check=False)
    seconds = time.perf_counter() - start
    if not path.exists():
        return Outcome(name, seconds, None)
    return Outcome(name, seconds, [Bound(**bound) for bound in json.loads(path.read_text())["bounds"]])


def run_all(benchmarks: Sequence[Benchmark], quick: bool, folder: Path, scripts: Path = Path(__file__).parent) -> int:
    """Run them all and print a summary; returns the exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = [run_one(b.name, b.words(quick, os.environ), folder, scripts) for b in benchmarks]
    print(f"\n{Table(['', 'seconds', 'bounds that hold', 'missed'], [outcome.row() for outcome in outcomes])}\n")
    if not quick:
        print(f"Figures: {folder}. python benchmarks/report.py writes them into docs/performance.md.")
    return int(not all(outcome.bounds is not None if quick else outcome.holds for outcome in outcomes))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only check that everything runs")
    parser.add_argument("--only", nargs="+", choices=[b.name for b in BENCHMARKS], default=[], metavar="NAME")
    args = parser.parse_args(arguments)
    chosen = [b for b in BENCHMARKS if not args.only or b.name in args.only]
    return run_all(chosen, args.quick, OUTPUT / "quick" if args.quick else OUTPUT)


if __name__ == "__main__":
    raise SystemExit(main())
