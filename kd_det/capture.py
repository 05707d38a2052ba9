"""What a student's box head computed, seen at the one call that Standard, Cascade and Res5 heads all make."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from detectron2.layers import cat
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes
from torch import Tensor, nn


@dataclass(frozen=True)
class BoxStage:
    """One call of `box_predictor.losses`: N sampled proposals over all images, and what the student said of them."""

    student_logits: Tensor  # (N, foreground classes + background), with gradient
    gt_classes: Tensor  # (N,), background = number of foreground classes
    boxes: list[Boxes]  # per image, in pixels of the student's input image


@contextmanager
def capture_box_stages(heads: ROIHeads, layers: nn.ModuleList | None = None) -> Iterator[list[BoxStage]]:
    """Record a `BoxStage` a call of `box_predictor.losses(predictions, proposals)` while the context is open.

    A forward hook on the predictor would see no proposals, and the proposals' boxes may be replaced after the call
    (TRAIN_ON_PRED_BOXES). The method is shadowed on the instance for the time of one forward pass only, so that copies
    and pickles of the model never carry it.

    Args:
        heads: the ROI heads.
        layers: one a predictor, from the logits z, which are recorded, to those that the predictor's losses see (AEKT).
    """
    predictors = heads.box_predictor if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]
    stages: list[BoxStage] = []

    def recorded(losses, layer):
        def call(predictions, proposals, *args, **kwargs):
            gt_classes = cat([p.gt_classes for p in proposals], dim=0)
            stages.append(BoxStage(predictions[0], gt_classes, [p.proposal_boxes for p in proposals]))
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
