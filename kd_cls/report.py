"""The report of classifiers: accuracy by class, confusions, calibration, agreement with the teacher, curves."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_cls.checkpoint.checkpoint import BEST, LAST, read_metadata
from kd_cls.config import load_cfg
from kd_cls.data.build import build_data
from kd_cls.distributed import start_process
from kd_cls.evaluate import open_checkpoint
from kd_core.utils.errors import UserError
from kd_core.utils.latency import clock, multiply_adds
from kd_core.utils.report.agreement import agreement_table, by_class, percent
from kd_core.utils.report.curves import MAP_CLASSES, confusion_map, reliability
from kd_core.utils.report.page import Gallery, Page, Section
from kd_core.utils.report.runs import Run, complete_groups, read_run
from kd_core.utils.report.sections import (
    common_notes,
    curves_section,
    origin_section,
    results_section,
    seeds_section,
)
from kd_core.utils.report.tables import Cell, Metric, Number, Table

logger = logging.getLogger(__name__)
TOP1 = "val/top1"
ACCURACY = [
    Metric("top-1, last", TOP1),
    Metric("top-1, best", value=lambda run: max(run.series(TOP1)[1], default=None)),
    Metric("top-5, last", "val/top5"),
    Metric("cross-entropy, last", "val/loss", digits=4),
    Metric("top-1 of the moving average, last", "val/ema_top1"),
    Metric("top-5 of the moving average, last", "val/ema_top5"),
]
COST = [
    Metric("parameters", value=lambda run: run.info.get("parameters"), show=lambda count: f"{count / 1e6:.2f} M"),
    Metric("GFLOPs (multiply-adds of an image)", value=lambda run: run.info.get("gflops"), digits=3),
    Metric("images per second in training (last)", "img/s", digits=0),
    Metric("training time", value=lambda run: run.info.get("training_seconds"), show=clock),
]
CURVES = {
    "Accuracy": r"val/(ema_)?top[15]|top1",
    "Losses": r"(val/)?loss|task|[tn]ckd|mass|(within|cross)_.+|class|batch|int(er|ra)|(ex|im)plicit|review|kd.*",
    "Distillation and optimizer": r"K|lr|momentum/.+|grad_norm/.+|gsnr/.+|loss_scale|.*weight.*",
}
IMAGES = 10_000  # evaluated for a report, evenly spaced
BINS = 15  # of the expected calibration error
PAIRS = 12  # confusions shown


@dataclass(frozen=True)
class Predictions:
    """Logits (N, C) of best.pth for validation images, their classes (N,), and the classes' names."""

    logits: Tensor
    target: Tensor
    names: list[str]

    def is_alike(self, other: "Predictions") -> bool:
        """Whether two methods were asked the same."""
        same = self.logits.shape == other.logits.shape and self.names == other.names
        return same and torch.equal(self.target, other.target)

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def right(self) -> Tensor:
        return self.predicted == self.target

    def by_class(self, top: int) -> list[float]:
        """Per cent of each class's images whose class is among the `top` largest logits; NaN for an absent class."""
        hits = (self.logits.topk(min(top, self.logits.shape[1])).indices == self.target[:, None]).any(1)
        return by_class(100 * hits, self.target, self.logits.shape[1])

    def confusions(self) -> np.ndarray:
        """(C, C): images of the row's class that are taken for the column's."""
        classes = self.logits.shape[1]
        return torch.bincount(self.target * classes + self.predicted, minlength=classes**2).view(classes, -1).numpy()

    def calibration(self) -> tuple[list[float], list[float], float]:
        """Mean confidence and accuracy in each of `BINS` bins that is not empty; expected calibration error in %."""
        confidence, right = self.logits.double().softmax(1).amax(1), self.right.double()
        bins = (confidence * BINS).long().clamp(max=BINS - 1)
        parts = [bins == index for index in range(BINS) if (bins == index).any()]
        points = [(float(confidence[part].mean()), float(right[part].mean())) for part in parts]
        error = sum(int(part.sum()) * abs(c - a) for part, (c, a) in zip(parts, points, strict=True)) / len(bins)
        return [c for c, _ in points], [a for _, a in points], 100 * error


def read_classifier_run(folder: Path) -> Run:
    """A classifier's training, or one that is running."""
    run = read_run(folder)
    metadata = read_metadata(folder / LAST)
    run.max_iter = metadata.get("max_iter") or run.info.get("max_iter", 0)
    return run


def classifier_page(runs: Sequence[Run], title: str, baseline: str | None = None, predictions: bool = True) -> Page:
    """The page about `runs`, whose roles are assigned.

    Args:
        predictions: evaluate the runs' best.pth for accuracy by class, confusions and calibration.
    """
    groups = complete_groups(runs, TOP1)
    predicted = prediction_sections(groups) if predictions else []  # counts parameters, which the results show
    text = ["Accuracy on the validation images in per cent."]
    text += [] if predictions else ["tools/report.py adds accuracy by class, confusions and calibration."]
    sections = [
        results_section(groups, ACCURACY + COST, text),
        *predicted,
        curves_section(groups, CURVES),
        seeds_section(runs, ACCURACY[:3], TOP1, baseline),
        origin_section(runs),
    ]
    return Page(title, sections, common_notes(runs, TOP1, "top-1"))


def prediction_sections(groups: dict[str, list[Run]]) -> list[Section]:
    """By class, confusions and calibration, from the first run of each method that has weights and data here."""
    predictions, failed = {}, []
    for title, runs in groups.items():
        try:
            predictions[title] = predict(runs[0])
        except (UserError, OSError) as error:
            failed.append(f"{title}: no predictions: {error}")
    first = next(iter(predictions.values()), None)
    if first is None or not all(of.is_alike(first) for of in predictions.values()):
        reason = [] if first is None else ["The runs have other classes or images, so they are not compared by class."]
        return [Section("By class", [*failed, *reason])]
    teacher = next((title for title in predictions if groups[title][0].role == "teacher"), None)
    students = [title for title in predictions if title != teacher] or list(predictions)
    best = max(students, key=lambda title: predictions[title].right.double().mean())
    count = len(predictions[best].target)
    text = [f"best.pth of each method's first run, on {count} validation images.", *failed]
    sections = [Section("By class", text, [class_table(predictions, teacher if teacher != best else None, best)])]
    if teacher and best != teacher:
        own, theirs = predictions[best], predictions[teacher]
        table = agreement_table(theirs.logits, own.logits, own.target, own.names, best, "images")
        sections.append(Section("Agreement of teacher and student", [], [table]))
    return [*sections, confusion_section(predictions[best], best), calibration_section(predictions)]


@torch.no_grad()
def predict(run: Run) -> Predictions:
    """Run best.pth over the validation images, at most `IMAGES` of them.

    Raises:
        UserError: weights or data are not here.
    """
    if not (run.folder / BEST).is_file():
        raise UserError(f"there is no {run.folder / BEST}")
    cfg = load_cfg(str(run.folder / "config.yaml"), ["OUTPUT_DIR", str(run.folder), "MODEL.WEIGHTS", ""])
    if len(build_data(cfg).val) > IMAGES:
        cfg.DATA.VAL_IMAGES = IMAGES
    with start_process(cfg.DEVICE) as process:
        model, loader, names = open_checkpoint(cfg, process)
        run.info.setdefault("parameters", sum(p.numel() for p in model.parameters()))
        outputs, targets = [], []
        for images, target in loader:
            if "gflops" not in run.info:
                run.info["gflops"] = multiply_adds(model, images[:1]) / 1e9
            outputs.append(model(images).float().cpu())
            targets.append(target.cpu())
    return Predictions(torch.cat(outputs), torch.cat(targets), names)


def class_table(predictions: dict[str, Predictions], teacher: str | None, best: str) -> Table:
    """Top-1 and top-5 of each class; sorted by the gap to the teacher, or by top-1."""
    top1 = {title: of.by_class(1) for title, of in predictions.items()}
    top5 = {title: of.by_class(5) for title, of in predictions.items()}
    rows = []
    for index, name in enumerate(predictions[best].names):
        cells: list[Cell] = [[percent(top1[title][index]), " / ", percent(top5[title][index])] for title in predictions]
        gap = top1[teacher][index] - top1[best][index] if teacher else -top1[best][index]
        if teacher:
            cells.append([percent(gap, sign=True)])
        rows.append((-gap if gap == gap else np.inf, name, cells))
    rows.sort(key=lambda row: row[0])
    order = f"The largest gap between teacher and {best} first." if teacher else f"The lowest top-1 of {best} first."
    header = ["class", *predictions, *(["gap of top-1"] if teacher else [])]
    return Table(header, [(name, cells) for _, name, cells in rows], f"Top-1 / top-5 in per cent. {order}", paged=20)


def confusion_section(of: Predictions, title: str) -> Section:
    """The most frequent confusions of one method, and a map of all of them."""
    counts = of.confusions()
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    largest = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
    pairs = [divmod(int(place), len(counts)) for place in largest if wrong.flat[place]]
    rows: list[tuple[str, list[Cell]]] = [
        (
            of.names[true],
            [[of.names[taken]], [Number(int(counts[true, taken]), f"{counts[true, taken]} of {counts[true].sum()}")]],
        )
        for true, taken in pairs
    ]
    section = Section("Confusions", [f"Of {title}."], [Table(["class", "taken for", "images"], rows)])
    if not rows:
        section = Section("Confusions", [f"{title} confuses no two classes."])
    if len(counts) <= MAP_CLASSES:
        section.blocks.append(Gallery([confusion_map(counts, f"Confusions of {title}")]))
    return section


def calibration_section(predictions: dict[str, Predictions]) -> Section:
    """Whether a confidence of 80 % is right in 80 % of the cases."""
    found = {title: of.calibration() for title, of in predictions.items()}
    row: list[Cell] = [[percent(error)] for _, _, error in found.values()]
    table = Table(["", *found], [("expected calibration error, %", row)], f"{BINS} bins of equal width.")
    figure = reliability({title: (confidence, accuracy) for title, (confidence, accuracy, _) in found.items()})
    return Section("Calibration", [], [table, Gallery([figure])])
