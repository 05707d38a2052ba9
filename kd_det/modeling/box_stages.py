"""The rows that are distilled: what the student's box head computed on N boxes, and which of them count."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from detectron2.layers import cat
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

ROWS = ("all", "foreground", "weighted")


@dataclass(frozen=True)
class BoxStage:
    """One stage of a box head on N boxes over all images, and the student's logits."""

    student_logits: Tensor  # (N, C): foreground classes + background, with gradient
    gt_classes: Tensor  # (N,), background = number of foreground classes
    boxes: list[Boxes]  # per image, in pixels of the student's input image; together N
    weights: Tensor | None = None  # (N,) weights of the rows in the losses, None for 1
    suffix: str = ""  # of the terms' names

    @property
    def target(self) -> Tensor:
        """(N,) the classes, under the name that `Rows` has for them."""
        return self.gt_classes

    @property
    def foreground(self) -> Tensor:
        """(N,) whether a row has an object's class."""
        return self.gt_classes < self.student_logits.shape[1] - 1


@contextmanager
def capture_box_stages(
    heads: ROIHeads, layers: nn.ModuleList | None = None, detection_losses: bool = True
) -> Iterator[list[BoxStage]]:
    """Record one `BoxStage` per call of `box_predictor.losses(predictions, proposals)` while the context is open.

    Standard, Cascade (once per stage) and Res5 heads all make this call. A forward hook on the predictor would see no
    proposals, and the proposals' boxes may be replaced after the call (TRAIN_ON_PRED_BOXES). The method is shadowed on
    the instance during one forward pass only, so that copies and pickles of the model do not carry it.

    Args:
        heads: the ROI heads.
        layers: one per predictor (AEKT); maps the logits z, which are recorded, to those that its losses see.
        detection_losses: compute them; False makes the call return {}.
    """
    predictors = heads.box_predictor if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]
    stages: list[BoxStage] = []

    def recorded(losses, layer):
        def call(predictions, proposals, *args, **kwargs):
            gt_classes = cat([p.gt_classes for p in proposals], dim=0)
            stages.append(BoxStage(predictions[0], gt_classes, [p.proposal_boxes for p in proposals]))
            if not detection_losses:
                return {}
            if layer is not None:
                predictions = (layer(predictions[0]), *predictions[1:])
            return losses(predictions, proposals, *args, **kwargs)

        return call

    try:
        for predictor, layer in zip(predictors, layers or [None] * len(predictors), strict=True):
            predictor.__dict__["losses"] = recorded(predictor.losses, layer)
        yield stages
    finally:
        for predictor in predictors:
            predictor.__dict__.pop("losses", None)


@contextmanager
def capture_head_inputs(heads: ROIHeads) -> Iterator[list[tuple[dict[str, Tensor], list[Instances]]]]:
    """Record the (feature maps, ground truth) that `heads(images, features, proposals, targets)` is called with."""
    seen: list[tuple[dict[str, Tensor], list[Instances]]] = []
    hook = heads.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[1], inputs[3])))
    try:
        yield seen
    finally:
        hook.remove()


def select_rows(stage: BoxStage, rows: str, background_weight: float) -> BoxStage:
    """The rows that KD.ROWS names, weighted so that each option is Σ w·x / N over the N rows of `stage` (ours).

        all         w = 1
        foreground  w = 1 on foreground rows, 0 on background rows, which are dropped before the teacher's pass
        weighted    w = 1 on foreground rows, `background_weight` on background rows

    N stays the number of all rows, as in detectron2's box regression loss: an object weighs the same however many there
    are, and averaging over processes gives what one process computes. Without a foreground row the loss is 0, with a
    gradient. Dropping rows synchronises with the device.
    """
    if rows == "all":
        return stage
    foreground = stage.foreground
    dtype = torch.promote_types(stage.student_logits.dtype, torch.float32)
    if rows == "weighted":
        weights = torch.full_like(foreground, background_weight, dtype=dtype)
        return replace(stage, weights=weights.masked_fill(foreground, 1.0))
    kept = foreground.split([len(boxes) for boxes in stage.boxes])
    logits = stage.student_logits[foreground]
    return BoxStage(
        logits,
        stage.gt_classes[foreground],
        [boxes[keep] for boxes, keep in zip(stage.boxes, kept, strict=True)],
        logits.new_full((len(logits),), len(logits) / max(len(foreground), 1), dtype=dtype),
    )


def join_stages(first: BoxStage, second: BoxStage) -> BoxStage:
    """The rows of both stages, image by image; neither has weights."""
    counts = [[len(boxes) for boxes in stage.boxes] for stage in (first, second)]

    def interleave(*rows: Tensor) -> Tensor:
        parts = (values.split(count) for values, count in zip(rows, counts, strict=True))
        return torch.cat([part for image in zip(*parts, strict=True) for part in image])

    return BoxStage(
        interleave(first.student_logits, second.student_logits),
        interleave(first.gt_classes, second.gt_classes),
        [Boxes.cat(list(pair)) for pair in zip(first.boxes, second.boxes, strict=True)],
    )
