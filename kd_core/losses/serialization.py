"""The task-serialization layer of AEKT (arXiv 2409.01679), and its merge into the classifier."""

import torch
from torch import Tensor, nn


class SerializationLayer(nn.Linear):
    """y = W·z + b, C → C, which starts as the identity.

    Distillation acts on the classifier's logits z, classification on y, so the two tasks do not pull at the same
    numbers. W shows how classes relate. That there is such a layer is published; its identity start is ours.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, num_classes)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)


@torch.no_grad()
def merge_linear(classifier: nn.Linear, layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that equals `layer(classifier(x))`: (W·V, W·c + b), added up in float64.

    Args:
        classifier: V (C, D) and c (C,), or no bias.
        layer: W (C, C) and b (C,).

    Raises:
        ValueError: the layer does not take what the classifier gives.
    """
    if layer.in_features != classifier.out_features:
        raise ValueError(f"the layer takes {layer.in_features} classes, the classifier gives {classifier.out_features}")
    merge = layer.weight.double()
    weight = merge @ classifier.weight.double()
    bias = layer.bias.double()
    if classifier.bias is not None:
        bias = bias + merge @ classifier.bias.double()
    return weight.to(classifier.weight.dtype), bias.to(classifier.weight.dtype)
