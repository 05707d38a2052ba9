"""Pictures of detections: ground truth and several models on one image, side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, Metadata, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import SemanticSegmentor
from detectron2.structures import Instances
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from kd_core.losses.feature_config import distils
from kd_core.utils.errors import UserError
from kd_core.utils.files import write_whole
from kd_det.data import check_datasets, register_datasets
from kd_det.evaluation.drawing import SMALL_SIDE, Canvas, class_colour
from kd_det.evaluation.matching import Box, coco_detections, coco_of_records, match_detections
from kd_det.export import read_student
from kd_det.modeling.teacher.build import each_teacher, teacher_builders, teacher_config

TITLE_HEIGHT, TITLE_SIZE, GAP = 24, 14, 6  # pixels


@dataclass(frozen=True)
class Detector:
    """A model in eval mode under the input settings that it was trained with."""

    title: str
    model: nn.Module
    config: CfgNode

    def read(self, path: str) -> dict[str, Any]:
        """An image file as the model's input."""
        options = self.config.INPUT
        image = read_image(path, options.FORMAT)
        height, width = image.shape[:2]
        resize = T.ResizeShortestEdge([options.MIN_SIZE_TEST] * 2, options.MAX_SIZE_TEST)
        resized = resize.get_transform(image).apply_image(image)
        tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
        return {"image": tensor, "height": height, "width": width}

    @torch.no_grad()
    def detect(self, path: str) -> Instances:
        """Detections in the pixels of the image file, on the CPU."""
        return self.model([self.read(path)])[0]["instances"].to("cpu")

    @torch.no_grad()
    def segment(self, path: str) -> np.ndarray:
        """The class of every pixel of the image file, (H, W)."""
        return self.model([self.read(path)])[0]["sem_seg"].argmax(0).cpu().numpy()


def read_detectors(source: str, cfg: CfgNode, with_teacher: bool = True) -> list[Detector]:
    """The teachers that `cfg` names, where it distils, and the student in `source` (an OUTPUT_DIR or a checkpoint).

    Raises:
        UserError: what is missing or does not fit, with its key.
    """
    student = read_student(source)
    detectors = []
    if with_teacher and distils(cfg.KD):
        each = each_teacher(cfg)
        for index, (build, one) in enumerate(zip(teacher_builders(cfg), each, strict=True)):
            title = "teacher" if len(each) == 1 else f"teacher {index}"
            detectors.append(Detector(title, build().eval(), teacher_config(one)))
    student.model.to(cfg.MODEL.DEVICE)
    return [*detectors, Detector("student", student.model, student.config)]


def records_of(cfg: CfgNode, name: str, count: int) -> tuple[list[dict[str, Any]], Metadata]:
    """The first `count` records of a data set, and its metadata; UserError where the model's classes are others."""
    if count < 1:
        raise UserError(f"--images is {count}: it must be 1 or more")
    register_datasets(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TEST = (name,)
    check_datasets(cfg, ("TEST",))
    return DatasetCatalog.get(name)[:count], MetadataCatalog.get(name)


def side_by_side(
    record: dict[str, Any], metadata: Metadata, detectors: list[Detector], threshold: float
) -> Image.Image:
    """A row of panels: ground truth, then each detector's detections of a score above `threshold`: those that are
    right, those that are wrong, and what it missed. A segmentation is the class of every pixel in colour.
    """
    if all(isinstance(detector.model, SemanticSegmentor) for detector in detectors):
        return label_maps_side_by_side(record, metadata, detectors)
    rgb, names = read_image(record["file_name"], "RGB"), metadata.thing_classes
    truth = coco_of_records([record], len(names))
    objects = [Box(tuple(one["bbox"]), one["category_id"]) for one in truth.anns.values() if not one["iscrowd"]]
    panels = {"ground truth": Canvas(rgb, names).draw_truth(objects)}
    for detector in detectors:
        found = detector.detect(record["file_name"])
        detections = coco_detections(record["image_id"], found[found.scores > threshold])
        match = match_detections(truth, detections, [record["image_id"]])[record["image_id"]]
        panels[f"{detector.title}: {match}"] = Canvas(rgb, names).draw_match(match)
    return in_a_row({title: np.asarray(panel) for title, panel in panels.items()})


def label_maps_side_by_side(record: dict[str, Any], metadata: Metadata, models: list[Detector]) -> Image.Image:
    """The image, its labels, and each model's with the share of labelled pixels that are right; ignored ones black."""
    rgb, path = read_image(record["file_name"], "RGB"), record["sem_seg_file_name"]
    truth = read_image(path, "L")[..., 0]
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(metadata.stuff_classes)] = [class_colour(k) for k in range(len(metadata.stuff_classes))]
    panels, labelled = {"image": rgb, "ground truth": colours[truth]}, truth != metadata.ignore_label
    for model in models:
        found = model.segment(record["file_name"])
        right = (found == truth)[labelled].mean() if labelled.any() else 1.0
        panels[f"{model.title}: {right:.1%} right"] = colours[found]
    scale = 2 if max(rgb.shape[:2]) < SMALL_SIDE else 1
    return in_a_row({title: panel.repeat(scale, 0).repeat(scale, 1) for title, panel in panels.items()})


def in_a_row(panels: dict[str, np.ndarray]) -> Image.Image:
    """Images of one size (H, W, 3) side by side, each under its title."""
    height, width, _ = next(iter(panels.values())).shape
    image = Image.new("RGB", ((width + GAP) * len(panels) - GAP, height + TITLE_HEIGHT), "white")
    drawing, font = ImageDraw.Draw(image), ImageFont.load_default(TITLE_SIZE)
    for index, (title, pixels) in enumerate(panels.items()):
        left = index * (width + GAP)
        drawing.text((left + GAP, 3), title, fill="black", font=font)
        image.paste(Image.fromarray(pixels), (left, TITLE_HEIGHT))
    return image


def draw_comparison(
    sources: dict[str, Path], dataset: str, path: Path, images: int = 4, threshold: float = 0.5
) -> None:
    """One picture: a row for each of the first images of `dataset`, ground truth and each student's detections in it.

    Args:
        sources: a training's OUTPUT_DIR for each title.
        path: the PNG to write.
        images: number of rows.
        threshold: lowest score that is drawn.
    """
    students = [read_student(source) for source in sources.values()]
    detectors = [Detector(title, s.model, s.config) for title, s in zip(sources, students, strict=True)]
    metadata = MetadataCatalog.get(dataset)
    rows = [side_by_side(record, metadata, detectors, threshold) for record in DatasetCatalog.get(dataset)[:images]]
    picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for index, image in enumerate(rows):
        picture.paste(image, (0, sum(row.height for row in rows[:index])))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: picture.save(file, format="PNG"))


def draw_dataset(
    records: list[dict[str, Any]], metadata: Metadata, detectors: list[Detector], folder: Path, threshold: float
) -> list[Path]:
    """A PNG for each record, named after its place and its file; returns their paths."""
    if not 0 <= threshold < 1:
        raise UserError(f"--threshold is {threshold}: a score lies in [0, 1)")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, record in enumerate(records):
        image = side_by_side(record, metadata, detectors, threshold)
        paths.append(folder / f"{index:04d}_{Path(record['file_name']).stem}.png")
        write_whole(paths[-1], lambda file, image=image: image.save(file, format="PNG"))
    return paths
