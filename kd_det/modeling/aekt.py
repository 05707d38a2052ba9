"""AEKT's task-serialization layer behind a detector's classifiers: separate in training, merged in checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.modeling.roi_heads import ROIHeads
from torch import Tensor, nn

from kd_core.losses import SerializationLayer, merge_linear
from kd_core.utils.errors import UserError

LAYERS = "serialization."


def box_predictors(heads: ROIHeads) -> list[nn.Module]:
    """The box predictor of every stage; only a cascade has several."""
    return list(heads.box_predictor) if isinstance(heads.box_predictor, nn.ModuleList) else [heads.box_predictor]


def build_serialization(heads: ROIHeads) -> nn.ModuleList:
    """A layer y = W·z + b of (C, C), the identity at first, for the classifier of every stage.

    Raises:
        UserError: a box predictor whose logits are not those of a linear layer `cls_score`.
    """
    layers = nn.ModuleList()
    for predictor in box_predictors(heads):
        classifier = getattr(predictor, "cls_score", None)
        if not isinstance(classifier, nn.Linear) or classifier.bias is None:
            raise UserError(
                f"KD.LOSS.NAME aekt merges its layer into a linear classifier with a bias, cls_score, but that "
                f"of {type(predictor).__name__} is {classifier}: use FastRCNNOutputLayers or another loss"
            )
        layers.append(SerializationLayer(classifier.out_features))
    return layers


@contextmanager
def serialized_outputs(heads: ROIHeads, layers: nn.ModuleList) -> Iterator[None]:
    """While open, the box predictors return (W·z + b, box deltas), as inference needs."""
    hooks = [
        predictor.register_forward_hook(lambda _, __, output, layer=layer: (layer(output[0]), *output[1:]))
        for predictor, layer in zip(box_predictors(heads), layers, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def keep_out_of_state_dict(model: nn.Module) -> None:
    """Merge the layers into the classifiers in `model.state_dict()`; loading resets the layers to the identity."""
    model.register_state_dict_post_hook(merge_into_classifiers)
    model.register_load_state_dict_pre_hook(start_from_identity)


def merge_into_classifiers(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The state dict's post-hook: GeneralizedRCNN's names, each `cls_score` being W·(classifier) + b."""
    drop_keys(state, prefix + LAYERS)
    for name, classifier, layer in classifiers(model):
        state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"] = merge_linear(classifier, layer)


def drop_keys(state: dict[str, Any], prefix: str) -> None:
    """Delete what is under `prefix` in a state dict."""
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def start_from_identity(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The pre-hook of loading: a layer becomes the identity where its classifier is loaded, else it is unchanged."""
    for index, (name, _, layer) in enumerate(classifiers(model)):
        fresh = SerializationLayer(layer.out_features) if f"{prefix}{name}.weight" in state else layer
        state.update((f"{prefix}{LAYERS}{index}.{key}", value) for key, value in fresh.state_dict().items())


def classifiers(model: nn.Module) -> list[tuple[str, nn.Linear, SerializationLayer]]:
    """(name in `model`, classifier, layer) of every stage."""
    names = {module: name for name, module in model.named_modules()}
    linear = [predictor.cls_score for predictor in box_predictors(model.roi_heads)]
    return [(names[c], c, layer) for c, layer in zip(linear, model.serialization, strict=True)]


def factors(model: nn.Module) -> list[dict[str, dict[str, Tensor]]]:
    """Classifiers and layers before the merge, stage by stage, so that a training resumes to the bit."""
    return [{"classifier": c.state_dict(), "layer": layer.state_dict()} for _, c, layer in classifiers(model)]


def load_factors(model: nn.Module, saved: list[dict[str, dict[str, Tensor]]]) -> None:
    """Undo the merge; raises a UserError where the number of stages differs."""
    stages = classifiers(model)
    if len(stages) != len(saved):
        raise UserError(f"the checkpoint has AEKT's factors of {len(saved)} stages, the student has {len(stages)}")
    for (_, classifier, layer), state in zip(stages, saved, strict=True):
        classifier.load_state_dict(state["classifier"])
        layer.load_state_dict(state["layer"])
