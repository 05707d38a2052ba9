"""A linear classifier on frozen features: how a teacher learns classes of one's own in one pass over the images."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_core.utils.errors import UserError

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # of the weights, on standardised features
HELD_OUT = 5  # every fifth image chooses the decay
SAME = 1e-6  # standard deviation
ITERATIONS = 100  # of L-BFGS


def fit_head(model: nn.Module, loader: Any, device: torch.device) -> None:
    """Fit the model's last layer, logistic regression on its frozen features.

    Args:
        model: timm's, its classifier an `nn.Linear` of the new classes; the rest keeps its weights.
        loader: batches of normalised images and labels, without augmentation.
    Raises:
        UserError: the classifier is not a linear layer, or the features of all images are the same.
    """
    classifier = model.get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise UserError(
            f"the teacher's classifier is a {type(classifier).__name__}, not a linear layer that can be fitted on its "
            "features: train the teacher with kd_cls.train first, and give its config to --teacher"
        )
    features, labels = extract_features(model.to(device).eval(), classifier, loader)
    if features.std(0, correction=0).max() < SAME:
        raise UserError(
            "the network's features are the same for every image, so no classifier can tell them apart: images of this "
            "size may be too small for it (--size, --teacher-size), or the weights are not its own"
        )
    weight, bias = fit_logistic_regression(features, labels, classifier.out_features)
    with torch.no_grad():
        classifier.weight.copy_(weight)
        classifier.bias.copy_(bias)


@torch.no_grad()
def extract_features(model: nn.Module, classifier: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """What reaches the classifier (N, D), and the labels (N,)."""
    features, labels = [], []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
    for images, target in loader:
        model(images)
        labels.append(target)
    hook.remove()
    return torch.cat(features), torch.cat(labels)


def fit_logistic_regression(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Weight (C, D) and bias (C,) with the least cross-entropy; the decay is chosen on every fifth row.

    A teacher's probabilities are what it teaches, so the held-out cross-entropy decides, not the accuracy.
    """
    mean, std = features.mean(0), features.std(0, correction=0).clamp_min(1e-6)
    rows = (features - mean) / std
    held_out = torch.arange(len(rows), device=rows.device) % HELD_OUT == HELD_OUT - 1
    decay = DECAYS[0]
    if held_out.any():
        losses = {}
        for candidate in DECAYS:
            weight, bias = minimise(rows[~held_out], labels[~held_out], num_classes, candidate)
            losses[candidate] = F.cross_entropy(rows[held_out] @ weight.T + bias, labels[held_out]).item()
        decay = min(losses, key=losses.__getitem__)
    weight, bias = minimise(rows, labels, num_classes, decay)
    weight = weight / std  # back to features that are not standardised
    return weight, bias - weight @ mean


def minimise(rows: Tensor, labels: Tensor, num_classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """argmin of mean cross-entropy + decay / 2 · |weight|²."""
    weight = rows.new_zeros(num_classes, rows.shape[1]).requires_grad_()
    bias = rows.new_zeros(num_classes).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(rows @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    return weight.detach(), bias.detach()
