"""The figures of finished trainings, from metrics.json and student.yaml, in a table."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from tabulate import tabulate

from kd_core.utils.errors import UserError
from kd_core.utils.latency import clock
from kd_core.utils.report.runs import read_lines
from kd_core.utils.report.tables import mean_std
from kd_det.config import add_timm_config

KEYS = ("AP", "AP50", "AP75")


@dataclass(frozen=True)
class Run:
    """One finished training in its OUTPUT_DIR."""

    ap: float  # COCO AP, per cent
    ap50: float
    ap75: float
    seconds_per_iteration: float  # median over the training
    training_seconds: float  # time in iterations, without evaluation and start-up
    parameters: int


def read_run(output_dir: Path) -> Run:
    """The figures of the training in `output_dir`, on the first of its test sets.

    Raises:
        UserError: the folder holds no finished, evaluated training.
    """
    lines, group = read_lines(output_dir / "metrics.json"), "bbox"
    keys = {key for line in lines for key in line}
    if "bbox/AP" not in keys and any(key.endswith("/bbox/AP") for key in keys):  # several test sets, each by its name
        group = f"{read_student(output_dir).DATASETS.TEST[0]}/bbox"
    results = [line for line in lines if f"{group}/AP" in line]
    times = [line["time"] for line in lines if "time" in line] or [0.0]  # detectron2 times from the third iteration on
    if not results:
        raise UserError(f"{output_dir} holds no finished training: metrics.json has no {group}/AP")
    last = results[-1]
    iterations = last["iteration"]  # the results are written after the last iteration
    # detectron2 reports NaN where there are no detections: an AP of 0
    ap, ap50, ap75 = (0.0 if math.isnan(last[f"{group}/{key}"]) else last[f"{group}/{key}"] for key in KEYS)
    return Run(
        ap,
        ap50,
        ap75,
        float(np.median(times)),
        mean(times) * iterations,
        count_parameters(output_dir),
    )


def read_student(output_dir: Path) -> CfgNode:
    """`student.yaml`, as any user of plain detectron2 would read it (add_timm_config: for backbones of timm)."""
    cfg = get_cfg()
    add_timm_config(cfg)
    cfg.merge_from_file(str(output_dir / "student.yaml"), allow_unsafe=False)
    return cfg


def count_parameters(output_dir: Path) -> int:
    """Parameters of the plain detectron2 model that `student.yaml` describes."""
    cfg = read_student(output_dir)
    cfg.MODEL.DEVICE = "cpu"
    return sum(p.numel() for p in build_model(cfg).parameters())


def table(runs: dict[str, list[Run]]) -> str:
    """A Markdown table, one row per name; several runs of one name give mean ± standard deviation."""
    header = ["", "AP", "AP50", "AP75", "parameters", "s / iteration", "training time"]
    rows = [
        [
            name,
            *(mean_std([getattr(run, key) for run in group]) for key in ("ap", "ap50", "ap75")),
            f"{group[0].parameters / 1e6:.2f} M",
            f"{mean(run.seconds_per_iteration for run in group):.3f}",
            clock(mean(run.training_seconds for run in group)),
        ]
        for name, group in runs.items()
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
