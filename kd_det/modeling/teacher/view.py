"""A batch as a teacher sees it: features, proposals, logits on given boxes; and rows at the teacher's proposals."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import cat
from detectron2.modeling.roi_heads import (
    CascadeROIHeads,
    FastRCNNOutputLayers,
    Res5ROIHeads,
    ROIHeads,
    StandardROIHeads,
)
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.compat import padding_options, square_size
from kd_det.modeling.box_stages import BoxStage, capture_box_stages

# Key of an input: the teacher's image (C, H', W'), the same view in another size.
TEACHER_IMAGE = "teacher_image"


class TeacherView:
    """A batch under the teacher's own channel order, mean and std, and in its own size where the inputs have one.

    It holds the teacher's feature maps: drop it before the student's backward pass.

    Args:
        model: the teacher: a `backbone`, `pixel_mean` and `pixel_std`, as all of detectron2's.
        batched_inputs: the student's inputs; each `image` (3, H, W) in `input_format`, not normalised. An item may
            have the same view in another size, (3, H', W'), as `teacher_image`.
        input_format: channel order of the images ("BGR", "RGB", …); None means the teacher's own.
    """

    @torch.no_grad()
    def __init__(
        self, model: nn.Module, batched_inputs: Sequence[dict[str, Any]], input_format: str | None
    ) -> None:
        self.model = model
        self.student_sizes = [tuple(x["image"].shape[1:]) for x in batched_inputs]
        own = getattr(model, "input_format", None)
        views = [
            {"image": convert_channels(x.get(TEACHER_IMAGE, x["image"]), input_format, own)} for x in batched_inputs
        ]
        square = square_size(model.backbone)
        views = [{"image": fit_square(view["image"], square)} for view in views] if square else views
        images = preprocess_image(model, views)
        self.sizes = images.image_sizes
        self.padded_size = images.tensor.shape[2:]
        self.features = model.backbone(images.tensor)

    def scale(self) -> tuple[float, float]:
        """Of height and width: a pixel of the teacher's images in the student's pixels.

        Raises:
            UserError: it is not the same for all images of the batch, to rounding: maps of the whole batch, which are
                compared, do not lie over each other then.
        """
        first = self.student_sizes[0]
        scale = tuple(ours / theirs for ours, theirs in zip(first, self.sizes[0], strict=True))
        for ours, theirs in zip(self.student_sizes, self.sizes, strict=True):
            if any(abs(o / s - t) > 1 + o / f for o, s, t, f in zip(ours, scale, theirs, first, strict=True)):
                raise UserError(
                    f"The images of a batch are of sizes {self.student_sizes} for the student and {self.sizes} for the "
                    "teacher, in different ratios: maps of pixels and of features are compared for the whole batch, so "
                    f"give every {TEACHER_IMAGE!r} the same scale"
                )
        return scale

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width of the padded images, in the student's pixels; see `scale` for errors."""
        return tuple(n * factor for n, factor in zip(self.padded_size, self.scale(), strict=True))

    @torch.no_grad()
    def box_logits(self, boxes: Sequence[Sequence[Boxes]]) -> list[Tensor]:
        """Classification logits of the teacher's box head.

        Args:
            boxes: for each stage of the student's ROI head the boxes of each image, in pixels of the student's image.

        Returns:
            For each stage, logits (N, foreground classes + background), rows ordered as the boxes are.
        """
        scaled = [[scale_boxes(*item) for item in zip(b, self.student_sizes, self.sizes, strict=True)] for b in boxes]
        return [stage_logits(self.model.roi_heads, self.features, stage, k) for k, stage in enumerate(scaled)]

    @torch.no_grad()
    def proposals(self) -> list[Instances]:
        """The proposals of the teacher's RPN at inference, best first, in pixels of the student's images."""
        if self.model.proposal_generator is None:
            raise UserError("KD.PROPOSALS student+teacher: the teacher has no RPN; set KD.PROPOSALS student")
        # The RPN reads only the images' sizes: any tensor will do, and the images need not be kept.
        images = ImageList(next(iter(self.features.values())), self.sizes)
        found, _ = self.model.proposal_generator(images, self.features, None)
        return [
            rescale_proposals(p, theirs, ours)
            for p, theirs, ours in zip(found, self.sizes, self.student_sizes, strict=True)
        ]


def preprocess_image(model: nn.Module, batched_inputs: Sequence[dict[str, Any]]) -> ImageList:
    """The batch normalised and padded by the model; a SemanticSegmentor has no method for it."""
    if hasattr(model, "preprocess_image"):
        return model.preprocess_image(batched_inputs)
    images = [(x["image"].to(model.pixel_mean.device) - model.pixel_mean) / model.pixel_std for x in batched_inputs]
    return ImageList.from_tensors(images, model.backbone.size_divisibility, **padding_options(model.backbone))


def fit_square(image: Tensor, side: int) -> Tensor:
    """An image (C, H, W), made smaller where it does not fit into a square of `side` pixels."""
    longest = max(image.shape[1:])
    if longest <= side:
        return image
    size = [max(int(length * side / longest), 1) for length in image.shape[1:]]
    resized = nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.round().to(image.dtype) if not image.is_floating_point() else resized.to(image.dtype)


def scale_boxes(boxes: Boxes, size: tuple[int, int], target: tuple[int, int]) -> Boxes:
    """Boxes in an image of (height, width) `size`, in the pixels of the same image in `target` size."""
    if tuple(size) == tuple(target):
        return boxes
    scaled = boxes.clone()
    scaled.scale(target[1] / size[1], target[0] / size[0])
    return scaled


def rescale_proposals(proposals: Instances, size: tuple[int, int], target: tuple[int, int]) -> Instances:
    """RPN proposals carried over to the same image in another size."""
    boxes = scale_boxes(proposals.proposal_boxes, size, target)
    boxes.clip(target)
    return Instances(target, proposal_boxes=boxes, objectness_logits=proposals.objectness_logits)


def convert_channels(image: Tensor, source: str | None, target: str | None) -> Tensor:
    """An image (C, H, W) in another channel order: BGR ↔ RGB, before any normalisation.

    Raises:
        UserError: the two orders differ and are not BGR and RGB.
    """
    if source is None or target is None or source == target:
        return image
    if {source, target} == {"BGR", "RGB"}:
        return image.flip(0)
    raise UserError(f"The teacher's INPUT.FORMAT is {target!r} and the student's {source!r}: only BGR and RGB convert")


def stage_logits(heads: ROIHeads, features: dict[str, Tensor], boxes: list[Boxes], stage: int) -> Tensor:
    """Logits (N, C) of `heads` on `boxes`: of the same stage in a cascade, else of the only one."""
    maps = [
        features[name] for name in (heads.in_features if isinstance(heads, Res5ROIHeads) else heads.box_in_features)
    ]
    if isinstance(heads, Res5ROIHeads):
        pooled = heads._shared_roi_transform(maps, boxes)
        return class_logits(heads.box_predictor, pooled.mean(dim=[2, 3]))
    pooled = heads.box_pooler(maps, boxes)
    if isinstance(heads, CascadeROIHeads):
        stage = min(stage, heads.num_cascade_stages - 1)
        return class_logits(heads.box_predictor[stage], heads.box_head[stage](pooled))
    return class_logits(heads.box_predictor, heads.box_head(pooled))


def class_logits(predictor: nn.Module, x: Tensor) -> Tensor:
    """Class logits (N, C) of a box predictor; detectron2's own need not compute box deltas for it."""
    if type(predictor).forward is FastRCNNOutputLayers.forward:
        return predictor.cls_score(x.flatten(1))
    return predictor(x)[0]


def stages_on_teacher_proposals(
    heads: ROIHeads, features: dict[str, Tensor], targets: list[Instances], views: list[TeacherView]
) -> list[BoxStage]:
    """The stages of the student's box head on the teachers' proposals (ours).

    The proposals of all teachers are sampled and labelled as the student's own are (BATCH_SIZE_PER_IMAGE,
    POSITIVE_FRACTION, ground truth appended) and go through the student's whole box head, every stage of a cascade
    included. No detection loss is computed on them, no other head sees them, and their scalars are not logged. They are
    sampled after the student's own proposals, whose sample does not change.

    Args:
        heads: the student's ROI heads, in training.
        features: its feature maps.
        targets: ground truth of every image.
        views: what each teacher sees of the batch.

    Raises:
        UserError: other heads than Standard, Cascade and Res5, or a teacher without an RPN.
    """
    if not isinstance(heads, StandardROIHeads | Res5ROIHeads):  # cascade heads are standard heads
        raise UserError(
            f"KD.PROPOSALS student+teacher runs the student's box head again, which is implemented for Standard, "
            f"Cascade and Res5 heads, but not for {type(heads).__name__}: set KD.PROPOSALS student"
        )
    proposals = [merge_proposals(image) for image in zip(*(view.proposals() for view in views), strict=True)]
    # Only what a box head reads: sampling would copy every mask once for each of its proposals.
    targets = [Instances(t.image_size, gt_boxes=t.gt_boxes, gt_classes=t.gt_classes) for t in targets]
    with EventStorage(get_event_storage().iter):
        sampled = heads.label_and_sample_proposals(proposals, targets)
        if isinstance(heads, Res5ROIHeads):
            return [res5_stage(heads, features, sampled)]
        with capture_box_stages(heads, detection_losses=False) as stages:
            heads._forward_box(features, sampled, *([targets] if isinstance(heads, CascadeROIHeads) else []))
    return stages


def merge_proposals(proposals: tuple[Instances, ...]) -> Instances:
    """The proposals of several teachers for one image, as one."""
    return proposals[0] if len(proposals) == 1 else Instances.cat(list(proposals))


def res5_stage(heads: Res5ROIHeads, features: dict[str, Tensor], proposals: list[Instances]) -> BoxStage:
    """The only stage of a C4 head, which has no method for its box branch."""
    boxes = [p.proposal_boxes for p in proposals]
    return BoxStage(stage_logits(heads, features, boxes, 0), cat([p.gt_classes for p in proposals]), boxes)
