"""Classifiers of sigmoids: the binary form of KD and DKD, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from kd_core.losses import AEKTLoss, DKDLoss, GDKDLoss, KDLoss
from kd_core.topk import TopKSchedule
from kd_core.utils.errors import UserError
from kd_det.modeling.sigmoid_loss import BinaryDKDLoss, binary_form, binary_kl, uses_sigmoid

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)


def logits(rows=6, classes=5):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_with_equal_weights_the_sum_is_the_divergence_of_every_binary_classifier():
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 4, 4])  # 4 is the background
    temperature = 2.0
    p, q = (z[:, :4].div(temperature).sigmoid() for z in (teacher, student))
    slow = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean() * temperature**2
    terms = BinaryDKDLoss(temperature=temperature)(student, teacher, target)
    assert_close(terms["tckd"] + terms["nckd"], slow)
    own = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())[torch.arange(4), torch.arange(4)]
    assert_close(terms["tckd"], own.sum() / 6 * temperature**2)


def test_the_gradient_is_that_of_binary_cross_entropy_against_the_teachers_probabilities():
    student, teacher = logits()
    student.requires_grad_()
    target = torch.full((6,), 4)
    (ours,) = torch.autograd.grad(sum(BinaryDKDLoss(temperature=1.0)(student, teacher, target).values()), student)
    cross = F.binary_cross_entropy_with_logits(student[:, :4], teacher[:, :4].sigmoid(), reduction="sum") / 6
    (expected,) = torch.autograd.grad(cross, student)
    assert_close(ours, expected)
    assert ours[:, 4].eq(0).all()  # nothing trains the background's logit


def test_terms_are_weighted_as_in_dkd_and_a_background_row_has_no_target_class():
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 4, 4])
    plain = BinaryDKDLoss(temperature=1.0)(student, teacher, target)
    ours = binary_form(DKDLoss(alpha=2.0, beta=0.25, temperature=1.0, weight=3.0))(student, teacher, target)
    assert_close(ours["tckd"], 6 * plain["tckd"])
    assert_close(ours["nckd"], 0.75 * plain["nckd"])
    background = BinaryDKDLoss(temperature=1.0)(student[4:], teacher[4:], target[4:])
    assert background["tckd"].item() == 0 and background["nckd"].item() > 0


@pytest.mark.parametrize(("dtype", "largest"), [(torch.float16, 65504.0), (torch.float32, 1e30), (torch.float64, 1e30)])
def test_values_and_gradients_are_finite_however_large_the_logits(dtype, largest):
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    student = (largest * signs).to(dtype).requires_grad_()
    teacher = (largest * signs.flip(0)).to(dtype)
    for temperature in (0.5, 4.0):
        terms = BinaryDKDLoss(temperature=temperature)(student, teacher, torch.tensor([0, 1]))
        (gradient,) = torch.autograd.grad(sum(terms.values()), student)
        assert all(value.isfinite() for value in terms.values()) and gradient.isfinite().all()


def test_a_float64_divergence_passes_gradcheck():
    student, teacher = logits(3, 2)
    assert torch.autograd.gradcheck(lambda z: binary_kl(z, teacher), student.requires_grad_())


@pytest.mark.parametrize(
    "loss",
    [
        GDKDLoss(k=2),
        AEKTLoss(),
        DKDLoss(partition="teacher_top1"),
        KDLoss(topk=TopKSchedule()),
        KDLoss(standardize=True),
    ],
)
def test_a_loss_that_partitions_a_softmax_is_refused(loss):
    with pytest.raises(UserError, match=rf"USE_SIGMOID_CE: {type(loss).__name__} .* takes KD.LOSS.NAME kd, or dkd"):
        binary_form(loss)


def with_sigmoid(model: nn.Module) -> nn.Module:
    """As detectron2's main branch marks its predictors; 0.5, which has no such key, reads no such attribute."""
    model.roi_heads.box_predictor.use_sigmoid_ce = True
    return model


def test_a_student_of_sigmoids_learns_from_a_teacher_of_sigmoids_alone(tiny_model, batch, storage):
    from kd_det import DistilledRCNN, Teacher

    parts = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    names = ("backbone", "proposal_generator", "roi_heads")
    with_sigmoid(parts)
    kwargs = {name: getattr(parts, name) for name in names}
    kwargs.update(pixel_mean=(100.0,) * 3, pixel_std=(1.0,) * 3)
    teacher = Teacher(with_sigmoid(tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")))
    student = DistilledRCNN(loss=DKDLoss(temperature=1.0), teacher=teacher, **kwargs)
    assert isinstance(student.loss, BinaryDKDLoss) and uses_sigmoid(student.roi_heads)
    losses = student(batch)
    assert losses["loss_kd_nckd"].requires_grad and losses["loss_kd_nckd"].item() >= 0
    softmax = Teacher(tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    mixed = DistilledRCNN(loss=DKDLoss(), teacher=softmax, **kwargs)
    with pytest.raises(UserError, match=r"student classifies by one sigmoid per class .*, its teacher by a softmax"):
        mixed.load_teacher()
