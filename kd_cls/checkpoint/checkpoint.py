"""Checkpoints of tensors and plain values, written whole or not at all, readable by plain timm.

`last.pth` and `best.pth` hold
    model, model_ema   the student (and its moving average) under timm's own names, AEKT's serialization layer merged in
    metadata           method, architecture, classes, input statistics, config and its hash, iteration, metrics
and last.pth, for --resume,
    factors            the two layers that `model` and `model_ema` hold merged
    training           iteration, optimizer streams, scheduler, scaler, best top-1
"""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import download_cached_file
from torch import nn

from kd_core.utils.errors import UserError
from kd_core.utils.files import unreadable_because, write_whole
from kd_core.utils.packaged_weights import PACKAGED, packaged_weights
from kd_core.utils.state_dict import check_fit

LAST, BEST = "last.pth", "best.pth"
URL = ("http://", "https://")


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def read_checkpoint(path: str | Path, key: str) -> dict[str, Any]:
    """A checkpoint of ours, on the CPU.

    Args:
        key: what named the file (a config key or an option), for the error message.

    Raises:
        UserError: no such file, a truncated one, or one with more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise UserError(f"{key}: there is no file {path}")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage raises another exception
        raise UserError(
            f"{key}: {path} cannot be read as a checkpoint: it is truncated, or holds more than tensors and plain "
            f"values ({unreadable_because(error)})"
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{key}: {path} holds a {type(loaded).__name__}, expected a dict of tensors")
    return loaded


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a checkpoint of ours; empty for any other file."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # another kind of file, or a broken one, which loading will report
        return {}
    return dict(loaded.get("metadata", {})) if isinstance(loaded, dict) else {}


def fetch(path: str, key: str) -> str:
    """A local path for `path`, which may be a URL (downloaded to torch's hub cache).

    Raises:
        UserError: no such file, or the URL cannot be fetched.
    """
    if path.startswith(URL):
        try:
            return download_cached_file(path, check_hash=False)
        except OSError as error:
            raise UserError(f"{key}: {path} cannot be fetched ({error})") from error
    if not Path(path).is_file():
        raise UserError(f"{key}: there is no file {path}")
    return path


def load_weights(model: nn.Module, path: str, key: str, new_classifier: bool = False) -> None:
    """Load the weights in `path` (ours, timm's, the papers' files, or safetensors) into every key of `model`.

    Args:
        path: a local file, a URL, or one of `PACKAGED`. If the file has a moving average, that is loaded, as timm does.
        key: the config key that named it, for error messages.
        new_classifier: keep the model's own classifier if the file's has another number of classes.

    Raises:
        UserError: the file is missing or cannot be read, or a weight is missing, unknown or of another shape.
    """
    weights = read_weights(path, key)
    own = model.state_dict()
    if new_classifier:
        weights = without_misfit_classifier(model, weights, own)
    check_fit(weights, own, f"{key}: {path}{written_for(path)}")
    model.load_state_dict(weights)


def read_weights(path: str, key: str) -> dict[str, Any]:
    """The state dict that `load_weights` loads."""
    if path in PACKAGED:
        return packaged_weights(path, timm.create_model(PACKAGED[path]).state_dict())
    local = fetch(path, key)
    try:
        return load_state_dict(local)
    except Exception as error:  # each kind of damage raises another exception
        raise UserError(f"{key}: {path} cannot be read as weights ({unreadable_because(error)})") from error


def without_misfit_classifier(model: nn.Module, weights: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """`weights`, with the classifier's replaced by the model's `own` if the number of classes differs."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {
        name: own[name] if name.startswith(prefixes) and name in own and own[name].shape != tensor.shape else tensor
        for name, tensor in weights.items()
    }


def written_for(path: str) -> str:
    """` (a checkpoint of <architecture>, <n> classes)` where the file says so."""
    metadata = read_metadata(path)
    if "architecture" not in metadata:
        return ""
    return f" (a checkpoint of {metadata['architecture']}, {metadata['num_classes']} classes)"
