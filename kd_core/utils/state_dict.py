"""Whether weights fit a model, and whether they are equal to others."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_core.utils.errors import UserError


@dataclass(frozen=True)
class Misfit:
    """How a state dict differs from a model's; false where it fits.

    Attributes:
        missing: weights of the model that the state dict lacks.
        unexpected: weights that the model has no place for.
        shapes: (name, shape in the state dict, shape in the model) of every weight whose shapes differ.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        """What is wrong, to follow the name of the file."""
        if self.shapes:
            name, found, expected = self.shapes[0]
            return (
                f"does not fit the model: {len(self.shapes)} weights have another shape, the first is {name} with "
                f"{tuple(found)}, expected {tuple(expected)}"
            )
        if self.missing:
            more = f" and has {len(self.unexpected)} others" if self.unexpected else ""
            return f"lacks {len(self.missing)} weights of the model{more}, the first is {self.missing[0]}"
        return f"has {len(self.unexpected)} weights that the model has no place for, the first is {self.unexpected[0]}"


def compare(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Misfit:
    """How `state` differs in names and shapes from `own`, the state dict of a model."""
    return Misfit(
        [name for name in own if name not in state],
        [name for name in state if name not in own],
        [(n, tuple(state[n].shape), tuple(own[n].shape)) for n in own if n in state and state[n].shape != own[n].shape],
    )


def check_fit(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> None:
    """Raise a UserError that begins with `source` unless `state` has the names and shapes of `own`."""
    if misfit := compare(state, own):
        raise UserError(f"{source} {misfit}")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and the bytes of named tensors, in their order, as hex digits."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        digest.update(name.encode())
        tensor = tensor.detach().cpu().contiguous()
        # Scalars as text: caches of teachers' logits that are on disk already were named so.
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else str(tensor).encode())
    return digest.hexdigest()
