"""Checkpoints that are written whole or not at all, and read without running code that they might hold."""

import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_core.utils.errors import DivergedError, UserError
from kd_core.utils.files import unreadable_because, write_text, write_whole
from kd_core.utils.packaged_weights import PACKAGED
from kd_core.utils.state_dict import Misfit
from kd_det.compat import RestrictedUnpickler


class UnreadableFile(UserError):
    """A file that is not a checkpoint, or is truncated."""


def check_pickle(file: BinaryIO) -> None:
    """Raise `pickle.UnpicklingError` unless the pickle holds nothing but numpy arrays in plain containers."""
    RestrictedUnpickler(file, encoding="latin1").load()


class WholeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe against a kill while it writes and against code in the files it reads.

    A checkpoint is written to a temporary file and renamed when it is complete; `last_checkpoint`, which `--resume`
    reads, is updated after it. `incompatible` is what the last `load` could not match.
    """

    incompatible: Any = None

    def save(self, name: str, **kwargs: Any) -> None:
        if not self.save_dir or not self.save_to_disk:
            return
        state = {"model": self.model.state_dict()}
        for key, value in state["model"].items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise DivergedError(f"{key} is not finite any more: no checkpoint {name} is written")
        state.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        state.update(kwargs)
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        write_whole(path, lambda file: torch.save(state, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As detectron2's; a UserError where a URL cannot be downloaded."""
        download(path, "MODEL.WEIGHTS")
        return super().load(path, *args, **kwargs)

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                with PathManager.open(filename, "rb") as file:
                    check_pickle(file)
                return super()._load_file(filename)
            with PathManager.open(filename, "rb") as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:  # a broken file may raise anything
            raise UnreadableFile(
                f"{filename} cannot be read as a checkpoint: it is truncated, or holds more than tensors "
                f"({unreadable_because(error)})"
            ) from error
        if not isinstance(loaded, dict):
            raise UserError(f"{filename} holds a {type(loaded).__name__}, expected a dict of tensors")
        if filename.endswith(".pyth") and "model_state" in loaded:  # of pycls: other names, which detectron2 can match
            state = {k: v for k, v in loaded["model_state"].items() if not k.endswith("num_batches_tracked")}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def load_all_weights(model: nn.Module, path: str, key: str) -> None:
    """Load `path` into `model`, every key of it.

    Args:
        key: the config key that named the file, for the error message.

    Raises:
        UserError: the file is missing or unreadable, or any weight of the model is missing from it or has another
        shape.
    """
    checkpointer = WholeCheckpointer(model, save_to_disk=False)
    check_local_file(key, download(path, key))
    try:
        checkpointer.load(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    misfit = misfit_of(checkpointer.incompatible)
    if misfit.shapes or misfit.missing:
        raise UserError(f"{key}: {path} {misfit}")


def download(path: str, key: str) -> str:
    """The local file of a path, a URL or a detectron2:// name that the config key names; "" for "".

    Raises:
        UserError: it cannot be downloaded, or the scheme is unknown.
    """
    try:
        local = PathManager.get_local_path(path) if path else ""
    except Exception as error:  # every file handler has exceptions of its own
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {path} cannot be downloaded ({reason}); name a local file") from error
    if "://" in path and not os.path.isfile(local):
        raise UserError(f"{key}: {path} is no address that detectron2 can download; name a local file")
    return local


def check_local_file(key: str, path: str, hint: str = "") -> None:
    """Raise a UserError where `key` names a file that is not there.

    URLs, names with a scheme and packaged weights (`efficientnet-lite0`) are not checked.

    Args:
        hint: where such a file comes from.
    """
    if path and "://" not in path and path not in PACKAGED and not os.path.isfile(path):
        start = "" if os.path.isabs(path) else f"relative paths start at the working folder, {os.getcwd()}"
        more = "; ".join(part for part in (hint, start) if part)
        raise UserError(f"{key}: there is no file {path}{f' ({more})' if more else ''}")


def misfit_of(incompatible: Any) -> Misfit:
    """What fvcore's checkpointer could not match; it counts a weight of another shape as missing, too."""
    shapes = [(name, tuple(found), tuple(expected)) for name, found, expected in incompatible.incorrect_shapes]
    other_shape = {name for name, *_ in shapes}
    missing = [name for name in incompatible.missing_keys if name not in other_shape]
    return Misfit(missing, list(incompatible.unexpected_keys), shapes)
