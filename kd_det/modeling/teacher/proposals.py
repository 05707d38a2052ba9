"""KD.PROPOSALS student+teacher: rows to distil at the boxes that the teacher's RPN proposes."""

from detectron2.layers import cat
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, ROIHeads, StandardROIHeads
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor

from kd_det.modeling.box_stages import capture_box_stages
from kd_det.modeling.rows import BoxStage
from kd_det.modeling.teacher.view import TeacherView, stage_logits


def stages_on_teacher_proposals(
    heads: ROIHeads, features: dict[str, Tensor], targets: list[Instances], views: list[TeacherView]
) -> list[BoxStage]:
    """The stages of the student's box head on the teachers' proposals (ours; no paper says more than that they exist).

    The proposals of all teachers are sampled and labelled as the student's own are (BATCH_SIZE_PER_IMAGE,
    POSITIVE_FRACTION, ground truth appended) and go through the student's whole box head, every stage of a cascade
    included. No detection loss is computed on them, no other head sees them, and what they would log is discarded.
    Their draws come after the student's own, whose sample does not change.

    Args:
        heads: the student's ROI heads, in training.
        features: its feature maps.
        targets: ground truth of every image.
        views: what each teacher sees of the batch.

    Raises:
        ValueError: other heads than Standard, Cascade and Res5, or a teacher without an RPN.
    """
    if not isinstance(heads, StandardROIHeads | Res5ROIHeads):  # cascade heads are standard heads
        raise ValueError(
            f"KD.PROPOSALS student+teacher runs the student's box head again, which is known of Standard, Cascade and "
            f"Res5 heads, but not of {type(heads).__name__}: set KD.PROPOSALS student"
        )
    proposals = [merge_proposals(image) for image in zip(*(view.proposals() for view in views), strict=True)]
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
    """The only stage of a C4 head, whose box branch is no method of its own."""
    boxes = [p.proposal_boxes for p in proposals]
    return BoxStage(stage_logits(heads, features, boxes, 0), cat([p.gt_classes for p in proposals]), boxes)
