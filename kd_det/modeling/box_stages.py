"""What a student's ROI heads were given and computed, seen while its own forward pass runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.layers import cat
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Instances
from torch import Tensor, nn

from kd_det.modeling.rows import BoxStage


@contextmanager
def capture_box_stages(
    heads: ROIHeads, layers: nn.ModuleList | None = None, detection_losses: bool = True
) -> Iterator[list[BoxStage]]:
    """Record a `BoxStage` a call of `box_predictor.losses(predictions, proposals)` while the context is open.

    It is the one call that Standard, Cascade (once a stage) and Res5 heads all make. A forward hook on the predictor
    would see no proposals, and the proposals' boxes may be replaced after the call (TRAIN_ON_PRED_BOXES). The method is
    shadowed on the instance for the time of one forward pass only, so that copies and pickles of the model never carry
    it.

    Args:
        heads: the ROI heads.
        layers: one a predictor, from the logits z, which are recorded, to those that the predictor's losses see (AEKT).
        detection_losses: False computes none, and the call returns {}.
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
