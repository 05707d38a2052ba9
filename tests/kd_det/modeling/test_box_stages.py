"""Which rows are distilled, and with what weight."""

import pytest
import torch
from detectron2.structures import Boxes
from torch.testing import assert_close

from kd_core.losses import DKDLoss
from kd_det.modeling.box_stages import BoxStage, join_stages, select_rows


def make_stage(gt_classes=((0, 3, 2), (3, 1)), seed=0):
    """Rows of two images and 3 + 1 classes; a box's corner tells the image, its size the row."""
    generator = torch.Generator().manual_seed(seed)
    labels = [torch.tensor(image, dtype=torch.long) for image in gt_classes]
    boxes = [
        Boxes(torch.tensor([[i, i, i + 1.0 + n, i + 1.0] for n in range(len(image))]).view(-1, 4))
        for i, image in enumerate(gt_classes)
    ]
    logits = torch.randn(sum(map(len, labels)), 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return BoxStage(logits, torch.cat(labels), boxes)


def teacher_of(rows=5):
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def loss(stage, teacher):
    """The summed DKD of a stage, and its gradient with respect to the logits of all rows."""
    weights = {} if stage.weights is None else {"row_weights": stage.weights}
    return sum(DKDLoss(temperature=1.0)(stage.student_logits, teacher, stage.gt_classes, **weights).values())


def test_foreground_rows_are_dropped_with_their_boxes_and_weigh_what_they_weigh_among_all():
    stage = make_stage()
    teacher = teacher_of()
    kept = select_rows(stage, "foreground", 1.0)
    assert kept.gt_classes.tolist() == [0, 2, 1]
    assert [b.tensor[:, 2].tolist() for b in kept.boxes] == [[1, 3], [3]]
    ours = loss(kept, teacher[stage.foreground])
    masked = DKDLoss(temperature=1.0)(stage.student_logits, teacher, stage.gt_classes, row_weights=stage.foreground)
    assert_close(ours, sum(masked.values()))
    assert ours.item() > 0.01
    (gradient,) = torch.autograd.grad(ours, stage.student_logits)
    assert gradient[~stage.foreground].eq(0).all() and gradient[stage.foreground].ne(0).any(1).all()


def test_a_background_weight_of_1_is_all_rows_and_of_0_the_foreground():
    stage, teacher = make_stage(), teacher_of()
    assert select_rows(stage, "all", 0.5) is stage
    assert_close(loss(select_rows(stage, "weighted", 1.0), teacher), loss(stage, teacher))
    foreground = loss(select_rows(stage, "foreground", 1.0), teacher[stage.foreground])
    assert_close(loss(select_rows(stage, "weighted", 0.0), teacher), foreground)
    third = loss(select_rows(stage, "weighted", 1 / 3), teacher)  # to float64's precision
    assert_close(third, loss(stage, teacher) / 3 + foreground * 2 / 3, rtol=1e-14, atol=0)
    half = loss(select_rows(stage, "weighted", 0.5), teacher)
    assert_close(half, (loss(stage, teacher) + foreground) / 2)


@pytest.mark.parametrize("gt_classes", [((3, 3), (3,)), ((), ())])
def test_without_foreground_rows_the_loss_is_0_with_a_gradient(gt_classes):
    stage = make_stage(gt_classes)
    kept = select_rows(stage, "foreground", 1.0)
    value = loss(kept, torch.zeros(0, 4, dtype=torch.float64))
    value.backward()
    assert value.item() == 0 and stage.student_logits.grad.eq(0).all()
    assert [len(b) for b in kept.boxes] == [0, 0]


def test_two_sets_of_rows_are_joined_image_by_image():
    first, second = make_stage(), make_stage(((1,), (2, 0)), seed=1)
    both = join_stages(first, second)
    assert both.gt_classes.tolist() == [0, 3, 2, 1, 3, 1, 2, 0]
    assert torch.equal(both.student_logits[3], second.student_logits[0])
    assert torch.equal(both.student_logits[6:], second.student_logits[1:])
    assert [len(b) for b in both.boxes] == [4, 4]
    assert both.boxes[1].tensor[:, 2].tolist() == [2, 3, 2, 3]
