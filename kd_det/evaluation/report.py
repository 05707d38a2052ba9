"""What a finished training says of itself: its figures from metrics.json, and its detections as a picture."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer
from tabulate import tabulate

from kd_core.utils.errors import UserError
from kd_det.config import add_timm_config


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
    """The figures of the training in `output_dir`.

    Raises:
        UserError: the folder holds no finished, evaluated training.
    """
    lines = read_metrics(output_dir / "metrics.json")
    results = [line for line in lines if "bbox/AP" in line]
    times = [line["time"] for line in lines if "time" in line]
    if not results or not times:
        raise UserError(f"{output_dir} holds no finished training: metrics.json has no bbox/AP")
    last = results[-1]
    iterations = last["iteration"]  # the results are written after the last iteration
    # detectron2 reports NaN where there is not one detection, which is an AP of 0
    ap, ap50, ap75 = (0.0 if math.isnan(last[key]) else last[key] for key in ("bbox/AP", "bbox/AP50", "bbox/AP75"))
    return Run(
        ap,
        ap50,
        ap75,
        float(np.median(times)),
        mean(times) * iterations,
        count_parameters(output_dir),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.json, one a logged iteration."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


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
    """A Markdown table, a row a name; several runs of one name give mean ± standard deviation."""
    header = ["", "AP", "AP50", "AP75", "parameters", "s / iteration", "training time"]
    rows = [
        [
            name,
            *(spread([getattr(run, key) for run in group]) for key in ("ap", "ap50", "ap75")),
            f"{group[0].parameters / 1e6:.2f} M",
            f"{mean(run.seconds_per_iteration for run in group):.3f}",
            clock(mean(run.training_seconds for run in group)),
        ]
        for name, group in runs.items()
    ]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def spread(values: list[float]) -> str:
    """One value, or mean ± sample standard deviation."""
    return f"{values[0]:.2f}" if len(values) == 1 else f"{mean(values):.2f} ± {stdev(values):.2f}"


def clock(seconds: float) -> str:
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def draw_detections(
    output_dirs: dict[str, Path], dataset: str, path: Path, images: int = 4, threshold: float = 0.5
) -> None:
    """A picture: a row an image of `dataset`, ground truth in the first column, each model's boxes in the next ones.

    Args:
        output_dirs: a finished training under each column's title.
        threshold: lowest score of a box that is drawn.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    metadata = MetadataCatalog.get(dataset)
    records = DatasetCatalog.get(dataset)[:images]
    figure, axes = plt.subplots(
        len(records), len(output_dirs) + 1, figsize=(3 * (len(output_dirs) + 1), 3 * len(records)), squeeze=False
    )
    for row, record in enumerate(records):
        rgb = read_image(record["file_name"], "RGB")
        axes[row][0].imshow(Visualizer(rgb, metadata, scale=2).draw_dataset_dict(record).get_image())
    for column, output_dir in enumerate(output_dirs.values(), start=1):
        predictor = load_predictor(output_dir)
        for row, record in enumerate(records):
            instances = predictor(read_image(record["file_name"], "BGR"))["instances"].to("cpu")
            drawn = Visualizer(read_image(record["file_name"], "RGB"), metadata, scale=2)
            axes[row][column].imshow(
                drawn.draw_instance_predictions(instances[instances.scores > threshold]).get_image()
            )
    for column, title in enumerate(["ground truth", *output_dirs]):
        axes[0][column].set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def load_predictor(output_dir: Path) -> DefaultPredictor:
    """Plain detectron2's predictor on the trained student, as any user would load it."""
    cfg = read_student(output_dir)
    cfg.MODEL.WEIGHTS = str(output_dir / "model_final.pth")
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return DefaultPredictor(cfg)
