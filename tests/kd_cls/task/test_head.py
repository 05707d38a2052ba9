"""A linear classifier on frozen features."""

import pytest
import timm
import torch
from torch.nn import functional as F

import kd_cls.models  # noqa: F401  (registers cifar_<name>)
from kd_cls.task.head import DECAYS, fit_head, fit_logistic_regression, minimise
from kd_core.utils.errors import UserError

CPU = torch.device("cpu")


def test_the_fit_is_stationary_and_a_large_decay_shrinks_it():
    rows, labels = torch.randn(60, 5).double(), torch.randint(3, (60,))
    fits = {}
    for decay in (1e-2, 1e-1):
        weight, bias = minimise(rows, labels, 3, decay)
        probabilities = (rows @ weight.T + bias).softmax(1)
        gradient = (probabilities - F.one_hot(labels, 3)).T @ rows / 60 + decay * weight
        assert gradient.abs().max() < 1e-4
        fits[decay] = weight.norm()
    assert fits[1e-1] < fits[1e-2]


def test_a_fit_on_features_of_any_scale_gives_the_same_logits():
    features, labels = torch.randn(50, 4).double(), torch.arange(50) % 2
    scale, shift = torch.tensor([1.0, 10, 100, 1e3]).double(), torch.tensor([0.0, 5, -3, 100]).double()
    weight, bias = fit_logistic_regression(features, labels, 2)
    scaled = features * scale + shift
    weight_scaled, bias_scaled = fit_logistic_regression(scaled, labels, 2)
    torch.testing.assert_close(features @ weight.T + bias, scaled @ weight_scaled.T + bias_scaled)


def test_labels_that_the_features_do_not_tell_get_the_largest_decay():
    features, labels = torch.randn(400, 50).double(), torch.randint(2, (400,))
    weight, bias = fit_logistic_regression(features, labels, 2)
    standardised = (features - features.mean(0)) / features.std(0, correction=0)
    expected, offset = minimise(standardised, labels, 2, max(DECAYS))
    torch.testing.assert_close(features @ weight.T + bias, standardised @ expected.T + offset)


def test_a_network_learns_new_classes_and_keeps_its_features():
    model = timm.create_model("cifar_resnet8", num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.arange(40) % 2
    images = torch.rand(40, 3, 16, 16) * 0.2 + labels.view(-1, 1, 1, 1) * 0.5
    fit_head(model, [(images[:24], labels[:24]), (images[24:], labels[24:])], CPU)
    assert torch.equal(model(images).argmax(1), labels)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_features_that_are_the_same_for_every_image_are_refused():
    model = timm.create_model("cifar_resnet8", num_classes=2)
    torch.nn.init.zeros_(model.conv1.weight)
    with pytest.raises(UserError, match=r"features are the same for every image"):
        fit_head(model, [(torch.rand(20, 3, 16, 16), torch.arange(20) % 2)], CPU)


def test_a_classifier_that_is_not_linear_is_refused():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=2)
    with pytest.raises(UserError, match=r"train the teacher with kd_cls\.train first"):
        fit_head(model, [], CPU)
