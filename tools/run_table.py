#!/usr/bin/env python
"""The detection table of docs/results.md: every method on the built-in digits, mean ± std over seeds.

    tools/run_table.py                                     # three seeds: hours on two CPU cores
    tools/run_table.py --jobs 2                            # two trainings at a time, the cores divided among them
    tools/run_table.py --methods baseline dkd --seeds 0

It can be interrupted at any time: the same command skips the trainings that are finished and resumes the others. The
time of an iteration is measured at the end, all methods in turn in one process on the same batches, so that other load
on the machine affects them equally.
"""

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))

from demo import CONFIGS, ROOT, Trainings, run_command, wait_for

from kd_core.utils.arguments import count
from kd_core.utils.files import write_text

if TYPE_CHECKING:
    from kd_det.analysis.iteration import Iteration

NO_MASK = ("KD.LOSS.TOPK.ENABLED", "False")
# name → title, config in configs/Digits, overrides
METHODS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "baseline": ("plain", "baseline", ()),
    "kd": ("KD", "kd", ()),
    "dkd": ("DKD", "dkd", ()),
    "gdkd": ("GDKD", "gdkd", ()),
    "aekt": ("AEKT", "aekt", ()),
    "dot": ("DOT (KD)", "dot", ()),
    "deepkd_kd": ("DeepKD (KD)", "deepkd_kd", ()),
    "deepkd": ("DeepKD (DKD)", "deepkd", ()),
    "deepkd_no_mask": ("DeepKD (DKD), no mask", "deepkd", NO_MASK),
}


def main(arguments: Sequence[str] | None = None) -> str:
    """The command; returns the table."""
    args = parse(arguments)
    output = args.output.resolve()
    teacher = output / "teacher"
    threads = max((os.cpu_count() or 1) // args.jobs, 1)
    environment = {"OMP_NUM_THREADS": str(threads)} if args.jobs > 1 else {}
    words = ("KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth"))
    with Trainings(args.jobs, environment) as trainings:
        wait_for(trainings.train("teacher", teacher, "SEED", "0", *args.options))
        students = [
            trainings.train(METHODS[name][1], output / f"{name}_seed{seed}", "SEED", str(seed), *own, *args.options)
            for seed in args.seeds
            for name in args.methods
            for own in [own_words(name, words)]
        ]
        for training in students:
            wait_for(training)
    text = report_table(args, output, iteration_times(args, words))
    write_text(output / "table.md", text + "\n")
    print(f"\n{text}\n\nSeeds {args.seeds}. Also in {output / 'table.md'}")
    return text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="the first has time 1.00")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students; the teacher's is 0")
    parser.add_argument("--jobs", type=count, default=1, help="trainings at a time (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=count, default=20, help="iterations of each method that are timed (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=ROOT / "output" / "table", help="where all is written (default: output/table)"
    )
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, in every training")
    return parser.parse_intermixed_args(arguments)


def own_words(name: str, teacher: tuple[str, ...]) -> tuple[str, ...]:
    """The overrides of a method, with the teacher's weights if it has a teacher."""
    return (*(() if name == "baseline" else teacher), *METHODS[name][2])


def report_table(args: argparse.Namespace, output: Path, seconds: dict[str, float]) -> str:
    """One row per method: AP, AP50, AP75 over the seeds, parameters, time of an iteration relative to the first."""
    from tabulate import tabulate

    from kd_core.utils.report.tables import mean_std
    from kd_det.evaluation.report import read_run

    runs = {"teacher": [read_run(output / "teacher")]} | {
        name: [read_run(output / f"{name}_seed{seed}") for seed in args.seeds] for name in args.methods
    }
    unit = seconds[args.methods[0]]
    rows = [
        [
            METHODS[name][0] if name in METHODS else name,
            *(mean_std([getattr(run, key) for run in group]) for key in ("ap", "ap50", "ap75")),
            f"{group[0].parameters / 1e6:.2f} M",
            f"{seconds[name] / unit:.2f}" if name in seconds else "",
        ]
        for name, group in runs.items()
    ]
    headers = ["", "AP", "AP50", "AP75", "parameters", "time / iteration"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def iteration_times(args: argparse.Namespace, words: tuple[str, ...]) -> dict[str, float]:
    """Median seconds of an iteration of each method, without loading data."""
    from kd_core.utils.latency import wait_for_device

    steps = {name: iteration(METHODS[name][1], [*own_words(name, words), *args.options]) for name in args.methods}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _, (name, step) in itertools.product(range(args.rounds + 2), steps.items()):
        start = time.perf_counter()
        step()
        wait_for_device(step.model)
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(measured[2:]) for name, measured in times.items()}


def iteration(config: str, words: list[str]) -> "Iteration":
    """Runs one iteration of a config's training where it is called."""
    from kd_det.analysis.iteration import build_iteration
    from kd_det.engine.launch import choose_device, read_config

    cfg = read_config(str(CONFIGS / f"{config}.yaml"), words)
    choose_device(cfg, num_gpus=1)
    return build_iteration(cfg)


if __name__ == "__main__":
    run_command("table", main, "interrupted; run the same command again to resume")
