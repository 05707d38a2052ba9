"""AEKT as we read it, and its serialization layer."""

import pytest
import torch
from torch import Tensor, nn

from kd_core.losses import AEKTLoss, DKDLoss, SerializationLayer, merge_linear


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_explicit_is_tckd_times_the_ratio_of_confidences_and_implicit_is_nckd() -> None:
    student, teacher, target = batch()
    terms = AEKTLoss(2.0, 3.0, 4.0, max_ratio=1e9)(student, teacher, target)
    ratios = [
        ((teacher[i] / 4).softmax(0)[t] / (student[i] / 4).softmax(0)[t]).item() for i, t in enumerate(target.tolist())
    ]
    tckd = [DKDLoss()(student[i : i + 1], teacher[i : i + 1], target[i : i + 1])["tckd"] for i in range(8)]
    expected = 2.0 * sum(ratio * term for ratio, term in zip(ratios, tckd, strict=True)) / 8
    torch.testing.assert_close(terms["explicit"], expected)
    torch.testing.assert_close(terms["implicit"], DKDLoss(beta=3.0)(student, teacher, target)["nckd"])
    gradients = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (terms["explicit"], expected))
    torch.testing.assert_close(*gradients)  # the ratio gets no gradient


def test_the_ratio_is_clipped() -> None:
    student, teacher = torch.tensor([[-50.0, 0.0, 0.0]]), torch.tensor([[50.0, 0.0, 0.0]])
    target = torch.tensor([0])
    explicit = AEKTLoss(temperature=1.0, max_ratio=10.0)(student, teacher, target)["explicit"]
    torch.testing.assert_close(explicit, 10 * DKDLoss(temperature=1.0)(student, teacher, target)["tckd"])


def test_a_student_as_confident_as_its_teacher_has_nothing_explicit_to_learn() -> None:
    student, _, target = batch()
    teacher = student.detach().clone()
    first, second = (target + 1) % 21, (target + 2) % 21
    rows = torch.arange(8)
    teacher[rows, first], teacher[rows, second] = teacher[rows, second], teacher[rows, first]
    terms = AEKTLoss()(student, teacher, target)
    assert terms["explicit"].item() == pytest.approx(0.0, abs=1e-12)
    assert terms["implicit"] > 0


def test_the_explicit_term_is_replaceable() -> None:
    student, teacher, target = batch()
    loss = AEKTLoss(3.0, temperature=2.0, explicit=lambda parts: -parts.log_mass_student[0])
    explicit = loss(student, teacher, target)["explicit"]
    expected = 3.0 * 4.0 * nn.functional.cross_entropy(student / 2, target)
    torch.testing.assert_close(explicit, expected)
    gradients = (torch.autograd.grad(value, student, retain_graph=True)[0] for value in (explicit, expected))
    torch.testing.assert_close(*gradients)


def test_a_ratio_cap_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="max_ratio must be above 0, not 0"):
        AEKTLoss(max_ratio=0)


def test_the_serialization_layer_starts_as_the_identity() -> None:
    layer = SerializationLayer(5)
    logits = torch.randn(3, 5)
    assert torch.equal(layer(logits), logits)


@pytest.mark.parametrize("bias", [True, False])
def test_the_merged_layer_is_the_two_layers(bias: bool) -> None:
    classifier, layer = nn.Linear(16, 5, bias=bias, dtype=torch.float64), SerializationLayer(5).double()
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    features = torch.randn(7, 16, dtype=torch.float64)
    weight, merged_bias = merge_linear(classifier, layer)
    expected = layer(classifier(features))
    torch.testing.assert_close(nn.functional.linear(features, weight, merged_bias), expected, rtol=1e-13, atol=1e-13)


def test_merging_an_untrained_layer_leaves_the_classifier_as_it_is_to_the_bit() -> None:
    classifier = nn.Linear(16, 5)
    weight, bias = merge_linear(classifier, SerializationLayer(5))
    assert torch.equal(weight, classifier.weight)
    assert torch.equal(bias, classifier.bias)
    assert not weight.requires_grad


def test_a_layer_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="the layer takes 6 classes, the classifier gives 5"):
        merge_linear(nn.Linear(16, 5), SerializationLayer(6))
