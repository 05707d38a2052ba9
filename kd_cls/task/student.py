"""The student in training. AEKT's serialization layer follows its classifier; saving merges the two into one layer."""

from typing import Any

from torch import Tensor, nn

from kd_cls.task.features import MapReader
from kd_core.losses import merge_linear
from kd_core.utils.errors import UserError


class Student(nn.Module):
    """Distilled logits z = model(x), and task logits W·z + b with a serialization layer (AEKT), z without.

    Args:
        model: a timm network with a linear classifier.
        serialization: a C×C linear layer, or None.
        freeze_bn: keep BatchNorm layers in eval mode and their weights as they are.

    Raises:
        UserError: a serialization layer and a classifier that is not linear.
    """

    def __init__(self, model: nn.Module, serialization: nn.Module | None = None, freeze_bn: bool = False) -> None:
        super().__init__()
        self.model, self.serialization, self.freeze_bn = model, serialization, freeze_bn
        if freeze_bn:
            for layer in batch_norms(model):
                layer.requires_grad_(False)
        if serialization is not None:
            check_mergeable(model)

    def train(self, mode: bool = True) -> "Student":
        """Like any module's, but frozen BatchNorm layers stay in eval mode."""
        super().train(mode)
        if self.freeze_bn:
            for layer in batch_norms(self.model):
                layer.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(distilled logits z, task logits), (N, C) each."""
        return self.both_logits(self.model(images))

    def with_maps(self, images: Tensor, reader: MapReader) -> tuple[Tensor, Tensor, list[Tensor]]:
        """(distilled logits z, task logits, feature maps), of one forward pass."""
        logits, maps = reader(self.model, images)
        return *self.both_logits(logits), maps

    def both_logits(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(z, task logits) of the network's logits z."""
        return logits, logits if self.serialization is None else self.serialization(logits)

    def predict(self, images: Tensor) -> Tensor:
        """The task logits (N, C)."""
        return self(images)[1]

    def merged_state_dict(self) -> dict[str, Any]:
        """The weights under the network's own names, W merged into the classifier: it then computes `predict`."""
        state = dict(self.model.state_dict())
        if self.serialization is not None:
            prefix = classifier_prefix(self.model)
            state[prefix + "weight"], state[prefix + "bias"] = merge_linear(classifier(self.model), self.serialization)
        return state

    def factors(self) -> dict[str, Any]:
        """The weights that `merged_state_dict` merges, by their names in `self`; none without a serialization layer."""
        if self.serialization is None:
            return {}
        parts = ("serialization.", f"model.{classifier_prefix(self.model)}")
        return {name: tensor for name, tensor in self.state_dict().items() if name.startswith(parts)}

    def load(self, merged: dict[str, Any], factors: dict[str, Any]) -> None:
        """Load the outputs of `merged_state_dict` and `factors`."""
        self.load_state_dict({f"model.{name}": tensor for name, tensor in merged.items()} | factors)


def check_mergeable(model: nn.Module) -> None:
    """Raise a UserError unless the last layer is linear with a bias: W·z + b can be merged into no other."""
    last = classifier(model)
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise UserError(
            "KD.LOSS.NAME aekt merges its layer into a linear classifier with a bias, and the last layer of "
            f"{type(model).__name__} is {last}: use another student or another loss"
        )


def classifier(model: nn.Module) -> nn.Module | None:
    """The last layer of a timm network."""
    return model.get_classifier() if hasattr(model, "get_classifier") else None


def classifier_prefix(model: nn.Module) -> str:
    """The name of the classifier's weights in the state dict, with the dot."""
    return next(f"{name}." for name, module in model.named_modules() if module is classifier(model))


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of a network."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
