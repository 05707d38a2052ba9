"""Reads ImageNet classifiers: from a local file, or by a name that torchvision or timm downloads."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_core.utils.files import unreadable_because
from kd_core.utils.packaged_weights import PACKAGED, packaged_weights
from kd_det.compat import numpy_allowed

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]
WRAPPERS = ("state_dict", "model", "model_state_dict")  # keys under which training scripts save the weights


@dataclass(frozen=True)
class Classifier:
    """A classifier's weights, and the mean and std of RGB in [0, 1] that it was trained with."""

    state_dict: dict[str, Tensor]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def read_classifier(source: str) -> Classifier:
    """The classifier that `source` names.

    Args:
        source: "torchvision:NAME", "torchvision:NAME:WEIGHTS" (such as IMAGENET1K_V1), "timm:NAME", one of `PACKAGED`,
            or a file: .safetensors, or written by torch.save. For a file, torchvision's mean and std are assumed.
    Raises:
        UserError: no such file or name; a file that is damaged or holds no weights; a download that failed.
    """
    library, colon, name = source.partition(":")
    if colon and library in LIBRARIES:
        return LIBRARIES[library](name)
    if source in PACKAGED:
        return _from_package(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"there is no file {source}; a source is a file, torchvision:NAME[:WEIGHTS] or timm:NAME")
    weights = read_state_dict(path)
    if any(name.startswith("teacher.") for name in weights):
        raise UserError(f"{path} holds a teacher beside the student: give --teacher-output to take them apart")
    return Classifier(weights)


def of_timm(model: nn.Module) -> Classifier:
    """The weights and the normalisation of a timm model.

    Raises:
        UserError: an anti-aliased one: it has a ResNet's names and computes something else.
    """
    if any(name.endswith(".aa") and not isinstance(module, nn.Identity) for name, module in model.named_modules()):
        raise UserError(
            f"{model.pretrained_cfg['architecture']} blurs where it shrinks its maps, which detectron2's networks do "
            "not: set MODEL.BACKBONE.NAME build_timm_fpn_backbone and MODEL.TIMM.NAME in place of a conversion"
        )
    return Classifier(model.state_dict(), model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The named tensors, or numpy arrays, in a checkpoint, without DataParallel's prefix; nothing else is unpickled.

    Raises:
        UserError: the file cannot be read, or holds other things.
    """
    content = _read_file(path)
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    kinds = Tensor | np.ndarray
    if not isinstance(content, dict) or not content or not all(isinstance(v, kinds) for v in content.values()):
        raise UserError(f"{path} holds no state dict: expected named tensors, bare or under {' or '.join(WRAPPERS)}")
    return {name.removeprefix("module."): torch.as_tensor(value) for name, value in content.items()}


def _read_file(path: Path) -> object:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with numpy_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise UserError(f"{path} needs the safetensors package: pip install safetensors") from error
    except Exception as error:  # a broken file may raise anything
        raise UserError(f"{path} is not a complete file of weights only: {unreadable_because(error)}") from error


def _from_torchvision(name: str) -> Classifier:
    from torchvision import models

    name, _, weights = name.partition(":")
    model = _downloaded(f"torchvision:{name}", lambda: models.get_model(name, weights=weights or "DEFAULT"))
    return Classifier(model.state_dict())


def _from_timm(name: str) -> Classifier:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"timm:{name} needs timm: pip install timm") from error
    return of_timm(_downloaded(f"timm:{name}", lambda: timm.create_model(name, pretrained=True)))


def _from_package(name: str) -> Classifier:
    """Weights from an installed package, under timm's names."""
    import timm

    weights = packaged_weights(name, timm.create_model(PACKAGED[name]).state_dict())
    return Classifier(weights, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


LIBRARIES: dict[str, Callable[[str], Classifier]] = {"torchvision": _from_torchvision, "timm": _from_timm}


def _downloaded(source: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:  # unknown name, unknown weights, no network: each library has its own exceptions
        raise UserError(
            f"{source} could not be downloaded: {_first_line(error)}; without a network, give a downloaded file instead"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
