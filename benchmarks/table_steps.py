"""The time of an iteration of every method of a detection table:  python benchmarks/table_steps.py TABLE [--rounds 20]

    OMP_NUM_THREADS=1 python benchmarks/table_steps.py configs/Search/detection_digits.yaml

Relative to the table's first method, with its options and the first value of every grid; teachers have random weights.
The methods take turns in one process on the same batches. Data loading is not counted.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from figures import ROOT, Table
from timing import by_turns

from kd_core.utils.arguments import count
from kd_core.utils.config import read_yaml
from kd_det.analysis.iteration import Iteration, build_iteration
from kd_det.data import register_datasets
from kd_det.engine.launch import choose_device, read_config

RANDOM_TEACHER = {"KD.TEACHER.WEIGHTS": "", "KD.TEACHER.ALLOW_RANDOM": True}


def main(arguments: Sequence[str] | None = None) -> Table:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="TABLE", help="configs/Search/*.yaml of detectors")
    parser.add_argument("--rounds", type=count, default=20, help="iterations of each method that are timed")
    args = parser.parse_args(arguments)
    table = read_yaml(str(args.table))
    sides = {name: iteration(method, table["options"]) for name, method in table["methods"].items()}
    seconds = by_turns(sides, args.rounds)
    first = seconds[next(iter(seconds))]
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, first, strict=True))
        rows.append([name, f"{1e3 * statistics.median(times):.0f}", f"{ratio:.2f}"])
    report = Table(["", "ms / iteration", "time / iteration"], rows)
    print(report)
    return report


def iteration(method: dict, options: dict) -> Iteration:
    """The iteration of a method's first try."""
    torch.manual_seed(0)
    first = {key: values[0] for key, values in method.get("grid", {}).items()}
    taught = RANDOM_TEACHER if method.get("teacher", True) else {}
    words = [str(word) for pair in {**options, **first, **taught, "SEED": 0}.items() for word in pair]
    cfg = read_config(str(ROOT / method["config"]), words)
    register_datasets(cfg)
    choose_device(cfg, num_gpus=1)
    return build_iteration(cfg)


if __name__ == "__main__":
    main()
