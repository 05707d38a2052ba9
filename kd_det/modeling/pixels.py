"""Pixels as rows: the logits of a segmentation head at its own stride, of the student and of a teacher."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

from kd_core.rows import flatten_rows
from kd_core.utils.errors import UserError
from kd_det.modeling.rows import Rows
from kd_det.modeling.teacher.view import TeacherView

IGNORE = ("label", "none")
# They are defined on the classes of a box head: AEKT's layer stands behind it, GDKDS has a background class.
BOX_LOSSES = ("aekt", "gdkds")


@dataclass(frozen=True)
class PixelOptions:
    """Which pixels are rows; the keys of KD.PIXELS.

    Args:
        upsample: enlarge the logits of both sides to the size of the label map first.
        ignore: "label": leave out the pixels with an ignored label; "none": all pixels are rows.
        sample: rows per image, drawn at random; 0 for all.

    Raises:
        UserError: an unknown value.
    """

    upsample: bool = False
    ignore: str = "label"
    sample: int = 0

    def __post_init__(self) -> None:
        if self.ignore not in IGNORE:
            raise UserError(f"KD.PIXELS.IGNORE is {self.ignore!r}, expected {' or '.join(IGNORE)}")
        if self.sample < 0:
            raise UserError(f"KD.PIXELS.SAMPLE is {self.sample}: rows per image, 0 for all")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "PixelOptions":
        """The options of KD.PIXELS."""
        node = cfg.KD.PIXELS
        return cls(node.UPSAMPLE, node.IGNORE, node.SAMPLE)


@dataclass(frozen=True)
class PixelMap(Rows):
    """The student's logits (B, C, h, w) and the labels (B, H, W) of the padded images."""


def check_pixel_loss(cfg: CfgNode, loss: nn.Module | None) -> None:
    """Raise a UserError for a loss that pixels cannot have."""
    if loss is None:
        return
    if cfg.KD.LOSS.NAME in BOX_LOSSES:
        raise UserError(
            f"KD.LOSS.NAME {cfg.KD.LOSS.NAME} is defined on the classes of a box head, and "
            f"{cfg.MODEL.META_ARCHITECTURE} distils pixels: use kd, dkd, gdkd, gdkd3 or dist"
        )
    if loss.needs_target and cfg.KD.PIXELS.IGNORE == "none":
        raise UserError(
            f"KD.PIXELS.IGNORE none makes a row of every pixel, but KD.LOSS.NAME {cfg.KD.LOSS.NAME} reads its label: "
            "set KD.PIXELS.IGNORE label, or a loss that reads no label, such as gdkd"
        )


@contextmanager
def capture_pixels(head: nn.Module, segmentation_loss: bool = True, suffix: str = "") -> Iterator[list[PixelMap]]:
    """Record a `PixelMap` per call of `head.losses(predictions, targets)` while the context is open.

    All heads of detectron2 make this call, with logits at their own stride; auxiliary predictions inside a head do not
    pass through it, and learn from the labels alone.

    Args:
        head: the segmentation head.
        segmentation_loss: compute the head's own; False makes the call return {}.
        suffix: of the terms' names.

    Raises:
        UserError: the head has no such method.
    """
    if not callable(getattr(head, "losses", None)):
        raise UserError(
            f"{type(head).__name__} has no method losses(predictions, targets), where distillation reads a "
            "segmentation head's logits: give it one, or set KD.LOSS.NAME none"
        )
    losses, maps = head.losses, []

    def call(predictions: Tensor, targets: Tensor, *args, **kwargs):
        maps.append(PixelMap(predictions, targets, suffix=suffix))
        return losses(predictions, targets, *args, **kwargs) if segmentation_loss else {}

    head.__dict__["losses"] = call
    try:
        yield maps
    finally:
        head.__dict__.pop("losses", None)


@torch.no_grad()
def teacher_map(view: TeacherView, rows: PixelMap) -> Tensor:
    """A teacher's logits (B, C, h, w) on the student's grid.

    The branch of the head that computes losses stops at its own stride, where inference would enlarge the logits to
    the image. The flag of the head alone chooses it: its layers stay in eval mode.
    """
    head = view.model.sem_seg_head
    head.training = True
    try:
        with capture_pixels(head, segmentation_loss=False) as maps:
            head(view.features, None)
    finally:
        head.training = False
    if not maps:
        raise UserError(
            f"{type(head).__name__} of the teacher did not call losses(predictions, targets), where distillation "
            "reads its logits"
        )
    return match_maps(maps[0].student_logits, rows.student_logits.shape[2:], rows.target.shape[1:], view.extent)


def match_maps(
    logits: Tensor, size: tuple[int, int], extent: tuple[int, int], teacher_extent: tuple[float, float]
) -> Tensor:
    """A map (B, C, h', w') on a grid of `size` (h, w), by bilinear interpolation where the strides differ.

    Args:
        logits: the teacher's map.
        size: of the student's map.
        extent: height and width of the padded images that the student's map covers, in pixels.
        teacher_extent: what the teacher's covers, in the student's pixels; another padding at the right and the bottom
            is cut off, or filled with the edge's logits.
    """
    size = tuple(size)
    full = tuple(round(n * theirs / ours) for n, ours, theirs in zip(size, extent, teacher_extent, strict=True))
    if tuple(logits.shape[2:]) != full:
        logits = F.interpolate(logits, full, mode="bilinear", align_corners=False)
    logits = logits[..., : size[0], : size[1]]
    missing = (size[0] - logits.shape[2], size[1] - logits.shape[3])
    return F.pad(logits, (0, missing[1], 0, missing[0]), mode="replicate") if any(missing) else logits


def pixel_rows(
    pixels: PixelMap, teacher_logits: Tensor, options: PixelOptions, ignore_value: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows (N, C), (N, C) and labels (N,) of the pixels that count; no labels where `options.ignore` is "none".

    Args:
        pixels: the student's map and the labels; labels at the head's stride are those at the centres of its cells.
        teacher_logits: (B, C, h, w).
        options: which pixels count.
        ignore_value: of the labels.
    """
    student, labels = pixels.student_logits, pixels.target
    if options.upsample:
        student, teacher_logits = (
            F.interpolate(side, labels.shape[1:], mode="bilinear", align_corners=False)
            for side in (student, teacher_logits)
        )
    elif labels is not None and labels.shape[1:] != student.shape[2:]:
        labels = cell_centres(labels, student.shape[2:])
    if options.ignore == "none":
        counted = int(ignore_value == 0)  # any label but the ignored one
        labels = torch.full_like(student[:, 0], counted, dtype=torch.long) if options.sample else None
    if options.sample:
        labels = keep_some(labels, options.sample, ignore_value)
    rows = flatten_rows(student, teacher_logits, labels, ignore_value)
    return rows if options.ignore == "label" else (*rows[:2], None)


def cell_centres(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels (B, H, W) at the centres of `size` cells; interpolation would need a copy as floats."""
    rows, columns = (
        (torch.arange(0.5, cells, device=labels.device) * (pixels / cells)).long()
        for cells, pixels in zip(size, labels.shape[1:], strict=True)
    )
    return labels[:, rows[:, None], columns]


def keep_some(labels: Tensor, count: int, ignore_value: int) -> Tensor:
    """Labels (B, H, W) in which `count` pixels of each image, drawn at random, are not ignored; on a tie a few more."""
    order = torch.rand(labels.shape, device=labels.device).masked_fill(labels == ignore_value, 2.0).flatten(1)
    if count >= order.shape[1]:
        return labels
    last = order.kthvalue(count, dim=1, keepdim=True).values
    return labels.masked_fill((order > last).view_as(labels), ignore_value)
