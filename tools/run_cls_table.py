#!/usr/bin/env python
"""The classification table of docs/results.md: every method on the built-in digits, mean ± std over seeds.

    python tools/run_cls_table.py [--methods baseline kd …] [--seeds 0 1 2] [--output output/digits] [KEY VALUE …]

Trains the teacher once, then configs/Digits/cls_<method>.yaml with each seed. Finished runs are skipped and
interrupted ones resumed: repeat the command until it prints the table (also in OUTPUT/cls_table.md).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from kd_cls.checkpoint.checkpoint import LAST
from kd_cls.config import load_cfg
from kd_cls.distributed import Process, start_process
from kd_cls.engine.cli import run_command
from kd_cls.train import summarise, train
from kd_core.losses.feature_config import distils
from kd_core.utils.files import write_text
from kd_core.utils.report.tables import mean_std

METHODS = {
    "baseline": "plain",
    "kd": "KD",
    "dkd": "DKD",
    "gdkd": "GDKD",
    "aekt": "AEKT",
    "dot": "DOT (KD)",
    "deepkd_kd": "DeepKD (KD)",
    "deepkd": "DeepKD (DKD)",
    "mlkd": "MLKD",
    "crld": "CRLD",
    "deepkd_crld": "DeepKD (CRLD)",
    "reviewkd": "ReviewKD",
}
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "Digits"


def run(method: str, seed: int, output: Path, words: Sequence[str], process: Process) -> dict[str, float]:
    """Metrics and number of parameters of one run, which is trained or resumed unless it is finished."""
    cfg = load_cfg(str(CONFIGS / f"cls_{method}.yaml"), list(words))
    cfg.SEED, cfg.OUTPUT_DIR = seed, str(output / f"cls_{method}" / f"seed_{seed}")
    if method == "teacher":
        cfg.OUTPUT_DIR = str(output / "cls_teacher")
    elif distils(cfg.KD):
        cfg.KD.TEACHER.WEIGHTS = str(output / "cls_teacher" / LAST)
    result = train(cfg, process, resume=True)
    weights = torch.load(Path(cfg.OUTPUT_DIR, LAST), weights_only=True)["model"]
    return result | {"parameters": sum(tensor.numel() for name, tensor in weights.items() if is_parameter(name))}


def is_parameter(name: str) -> bool:
    """Whether a state-dict entry is trained, rather than a statistic of BatchNorm."""
    return not name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def row(name: str, results: list[dict[str, float]], unit: float) -> list[str]:
    """One line of the table; times are relative to `unit` seconds."""
    loss, seconds = (summarise([result[key] for result in results])["mean"] for key in ("loss", "seconds"))
    parameters = f"{results[0]['parameters'] / 1000:.0f} k"
    top1 = mean_std([result["top1"] for result in results])
    return [name, parameters, top1, f"{loss:.3f}", f"{seconds:.0f}", f"{seconds / unit:.2f}"]


def main(arguments: Sequence[str] | None = None) -> str:
    """The command; returns the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", choices=METHODS, nargs="+", default=list(METHODS), help="the first has relative time 1.00"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("output/digits"))
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override, in every run")
    options = parser.parse_intermixed_args(arguments)
    with start_process("cpu") as process:
        teacher = run("teacher", 0, options.output, options.options, process)
        results = {
            method: [run(method, seed, options.output, options.options, process) for seed in options.seeds]
            for method in options.methods
        }
    unit = summarise([result["seconds"] for result in results[options.methods[0]]])["mean"]
    rows = [row("teacher", [teacher], unit), *(row(METHODS[m], results[m], unit) for m in options.methods)]
    headers = ["", "parameters", "top-1", "val loss", "seconds", "relative"]
    table = tabulate(rows, headers, tablefmt="pipe", disable_numparse=True)
    write_text(options.output / "cls_table.md", f"{table}\n")
    print(table)
    return table


if __name__ == "__main__":
    run_command(main)
