"""The report of detectors: AP by size and by class, cost, curves, and pictures of what they find."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

from kd_core.utils.latency import clock
from kd_core.utils.report.page import Page, Section
from kd_core.utils.report.runs import Run, complete_groups, finite, lookup, read_run
from kd_core.utils.report.sections import (
    common_notes,
    curves_section,
    origin_section,
    results_section,
    seeds_section,
)
from kd_core.utils.report.tables import Cell, Metric, Number, Table, group_cell
from kd_det.evaluation.figures import MAIN_FIGURES
from kd_det.evaluation.pictures import detection_sections

AP = "bbox/AP"
# Task → figures of it, the main one first, and what its classes' figures begin with.
SEGMENTATION = {
    "sem_seg": (
        {"mIoU": "mIoU", "fwIoU": "frequency-weighted IoU", "mACC": "mean accuracy", "pACC": "pixel accuracy"},
        "IoU-",
    ),
    "panoptic_seg": ({"PQ": "PQ", "SQ": "SQ", "RQ": "RQ", "PQ_th": "PQ, things", "PQ_st": "PQ, stuff"}, "PQ-"),
}
NAMES = {
    "AP": "AP",
    "AP50": "AP50",
    "AP75": "AP75",
    "APs": "AP small (below 32² px)",
    "APm": "AP medium",
    "APl": "AP large (above 96² px)",
}
CURVES = {
    "Average precision": r"(.+/)?bbox/AP(50|75)?",
    "Segmentation": r"(.+/)?(sem_seg/(mIoU|pACC)|panoptic_seg/PQ(_th|_st)?)",
    "Losses": r"total_loss|loss_(?!scale).+",
    "Distillation and optimizer": r"topk/K|momentum/.+|grad_norm/.+|gsnr/.+|loss_scale|lr",
}
LATENCY = re.compile(r"Total inference pure compute time: .* \(([0-9.]+) s / (?:iter|img) per device")


def read_detector_run(folder: Path) -> Run:
    """A detector's training."""
    run = read_run(folder)
    # The config's is that of SOLVER.REFERENCE_WORLD_SIZE processes.
    run.max_iter = run.info.get("max_iter") or lookup(run.config, "SOLVER", "MAX_ITER", default=0)
    return run


def detector_page(runs: Sequence[Run], title: str, baseline: str | None = None, logits: bool = True) -> Page:
    """The page about `runs`, whose roles are assigned.

    Args:
        logits: run teacher and student on some images to compare their logits.
    """
    prefixes = evaluation_prefixes(runs)
    main = main_key(prefixes[0]) if prefixes else AP
    boxes = not prefixes or any(task_of(prefix) == "bbox" for prefix in prefixes)
    metrics = [metric for prefix in prefixes for metric in precision_metrics(prefix)]
    text = ["AP and IoU in per cent, by COCO's definitions."] if metrics else ["No run has been evaluated yet."]
    groups = complete_groups(runs, main)
    sections = [results_section(groups, metrics + COST, text)]
    sections += [section for prefix in prefixes if (section := class_section(groups, prefix))]
    sections += [
        *(detection_sections(groups, best_student(groups, main), logits) if boxes else []),
        curves_section(groups, CURVES),
        seeds_section(runs, metrics[:3], main, baseline),
        origin_section(runs),
    ]
    return Page(title, sections, common_notes(runs, main, main.rpartition("/")[2]))


def evaluation_prefixes(runs: Sequence[Run]) -> list[str]:
    """What stands before a main figure: "bbox", "sem_seg"; "ema/bbox" for the moving average; "<data set>/bbox".

    Data sets come in the order of DATASETS.TEST: the first is what checkpoints are compared by.
    """
    ends = tuple(f"{task}/{figure}" for task, figure in MAIN_FIGURES.items())
    keys = dict.fromkeys(key for run in runs for key in run.scalars() if key.endswith(ends))
    order = list(MAIN_FIGURES)
    sets = list(dict.fromkeys(name for run in runs for name in lookup(run.config, "DATASETS", "TEST", default=[])))

    def place(prefix: str) -> tuple[bool, bool, int, int]:
        name = prefix.removeprefix("ema/").rpartition("/")[0]
        number = sets.index(name) if name in sets else len(sets)
        return prefix.startswith("ema/"), "/" in prefix, number, order.index(task_of(prefix))

    return sorted((key.rpartition("/")[0] for key in keys), key=place)


def task_of(prefix: str) -> str:
    """The last word of a prefix, such as "bbox"."""
    return prefix.rpartition("/")[2]


def main_key(prefix: str) -> str:
    """The key of the main figure under a prefix."""
    return f"{prefix}/{MAIN_FIGURES[task_of(prefix)]}"


def precision_metrics(prefix: str) -> list[Metric]:
    parts = prefix.removesuffix(task_of(prefix)).strip("/").split("/")
    where = "/".join("moving average" if part == "ema" else part for part in parts)
    names, _ = SEGMENTATION.get(task_of(prefix), (NAMES, ""))
    return [Metric(f"{label}, {where}" if where else label, f"{prefix}/{name}") for name, label in names.items()]


def class_section(groups: dict[str, list[Run]], prefix: str) -> Section | None:
    """AP or IoU by class, the largest remaining gap to the teacher first; without a teacher the lowest AP first."""
    runs = [run for group in groups.values() for run in group]
    _, each = SEGMENTATION.get(task_of(prefix), (NAMES, "AP-"))
    start = f"{prefix}/{each}"
    keys = dict.fromkeys(key for run in runs for key in run.scalars())
    names = [key.removeprefix(start) for key in keys if key.startswith(start)]
    if not names:
        return None
    teacher = next((group for group in groups.values() if group[0].role == "teacher"), None)
    best = groups[best_student(groups, main_key(prefix))]
    teacher = None if teacher is best else teacher  # alone on the page
    rows = []
    for name in names:
        metric = Metric(name, start + name)
        own = mean_of(best, metric.key, math.nan)
        gap = mean_of(teacher, metric.key, math.nan) - own if teacher else -own
        cells: list[Cell] = [group_cell(metric, group) for group in groups.values()]
        if teacher:
            cells.append([Number(gap, f"{gap:+.2f}")] if math.isfinite(gap) else ["–"])
        rows.append((-gap if math.isfinite(gap) else math.inf, name, cells))
    rows.sort(key=lambda row: row[0])
    if teacher:
        order = f"The gap is the teacher's {each[:-1]} less that of {best[0].title}; the largest stands first."
    else:
        order = f"The lowest {each[:-1]} of {best[0].title} stands first."
    header = ["class", *groups, *(["gap"] if teacher else [])]
    absent = " NaN: the class has no ground truth, or nothing was detected."
    table = Table(header, [(name, cells) for _, name, cells in rows], order + absent, paged=20)
    return Section("By class" if "/" not in prefix else f"By class, {prefix}", [], [table])


def best_student(groups: dict[str, list[Run]], key: str) -> str:
    """The method with the highest mean of `key` among those that are not teachers, if there are any."""
    titles = [title for title, group in groups.items() if group[0].role != "teacher"] or list(groups)
    return max(titles, key=lambda title: mean_of(groups[title], key, -math.inf))


def mean_of(runs: Sequence[Run], key: str, otherwise: float) -> float:
    values = finite(run.last(key) for run in runs)
    return mean(values) if values else otherwise


def latency(run: Run) -> float | None:
    """Seconds of the model for one image in the last evaluation, from log.txt."""
    path = run.folder / "log.txt"
    found = LATENCY.findall(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else []
    return float(found[-1]) if found else None


def iteration_seconds(run: Run) -> float | None:
    times = run.series("time")[1]
    return median(times) if times else None


def training_seconds(run: Run) -> float | None:
    """Time in iterations, without evaluation and start-up."""
    times = run.series("time")[1]
    return mean(times) * (min(run.iteration + 1, run.max_iter) or run.iteration + 1) if times else None


COST = [
    Metric("parameters", value=lambda run: run.info.get("parameters"), show=lambda count: f"{count / 1e6:.2f} M"),
    Metric("GFLOPs (multiply-adds of an image)", value=lambda run: run.info.get("gflops"), digits=1),
    Metric("latency of an image, ms", value=lambda run: (s := latency(run)) and 1000 * s, digits=1),
    Metric("seconds per iteration (median)", value=iteration_seconds, digits=3),
    Metric("training time, in iterations", value=training_seconds, show=clock),
]
