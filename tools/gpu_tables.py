#!/usr/bin/env python
"""The papers' CIFAR-100 table on one GPU, in pieces of minutes:  tools/gpu_tables.py --minutes 9

    tools/gpu_tables.py --minutes 9 DATA.ROOT datasets/cifar100       # repeat it until every row is there
    tools/gpu_tables.py DATA.ROOT … --table configs/Search/cifar100_short.yaml --jobs 12 --graphs    # 24 epochs each

Trains whatever of configs/Search/cifar100.yaml is missing with tools/search.py: the teacher beside the plain student,
then every other, several at a time on the one GPU, with all images on it. It stops in time, at most an epoch after each
training's last checkpoint, writes results.json and the table, and resumes when it is called again. --graphs replays
each step as a CUDA graph, which `make verify-gpu` checks. Without NVIDIA's MPS (nvidia-cuda-mps-control -d) the
trainings take turns on the GPU; with it they run side by side.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import search
import torch
from demo import ROOT, run_command

from kd_core.utils.arguments import count
from kd_core.utils.errors import UserError

TABLE = ROOT / "configs" / "Search" / "cifar100.yaml"


def main(arguments: Sequence[str] | None = None) -> str:
    """The command; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after so long (%(default)s)")
    parser.add_argument("--jobs", type=count, default=4, help="trainings at a time on the GPU (%(default)s)")
    parser.add_argument("--methods", nargs="+", help="methods of the table to run (default: all)")
    parser.add_argument("--graphs", action="store_true", help="SOLVER.CUDA_GRAPH True")
    parser.add_argument("--table", type=Path, default=TABLE, help="default: configs/Search/cifar100.yaml")
    parser.add_argument("--output", type=Path, help="where all of it goes (default: output/gpu_tables/TABLE)")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, in every training")
    args = parser.parse_intermixed_args(arguments)
    if not torch.cuda.is_available() and "DEVICE" not in args.options[::2]:
        raise UserError("torch finds no GPU here: take tools/search.py, or add DEVICE cpu")
    output = args.output or ROOT / "output" / "gpu_tables" / args.table.stem
    words = ["DATA.RESIDENT", "True", *args.options]
    if args.graphs:
        words += ["SOLVER.CUDA_GRAPH", "True"]
    methods = ["--methods", *args.methods] if args.methods else []
    options = ["--jobs", str(args.jobs), "--minutes", str(args.minutes), "--output", str(output)]
    return search.main([str(args.table), *words, *options, *methods])


if __name__ == "__main__":
    run_command("gpu_tables", main, "interrupted, or the time is over; run the same command again to resume")
