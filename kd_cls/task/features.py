"""The feature maps of timm's networks, in the forward pass that gives the logits: what a feature loss compares."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_core.utils.errors import UserError, one_line

LEVELS = 4  # at most, from the coarsest: the papers' code compares the stages without the stem
PREACT = ("none", "teacher", "both")
# Modules that may end a stage; a norm of timm's has its activation in a module of one of these.
ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish)


class Tap(NamedTuple):
    """Where a map before its activation is: the input or the output of a module."""

    module: str
    is_input: bool


@dataclass(frozen=True)
class MapReader:
    """Reads logits (N, C) and maps of a network: those of some stages, fine to coarse, and the pooled feature as a last
    map of 1×1.

    It names modules and holds none, so it also reads copies of the network, accelerated or averaged.

    Attributes:
        indices: of the stages in `forward_intermediates`.
        taps: {stage: where its map before the activation is}; the other stages' maps are read as they are.
        channels: of all maps.
    """

    indices: tuple[int, ...]
    taps: dict[int, Tap]
    channels: tuple[int, ...]

    def __call__(self, network: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        with tapped(network, self.taps) as seen:
            last, maps = network.forward_intermediates(images, indices=list(self.indices))
        logits, pooled = run_head(network, last)
        maps = [seen.get(index, found) for index, found in zip(self.indices, maps, strict=True)]
        return logits, [*maps, pooled[:, :, None, None]]


def run_head(network: nn.Module, last: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (N, C) of a network's last map, and the pooled feature (N, D) that reaches the classifier."""
    seen: list[Tensor] = []
    hook = network.get_classifier().register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    try:
        return network.forward_head(last), seen[0]
    finally:
        hook.remove()


@contextmanager
def tapped(network: nn.Module, taps: dict[int, Tap]) -> Iterator[dict[int, Tensor]]:
    """While open, records what passes at `taps`. An input is copied: an activation in place would overwrite it."""
    seen: dict[int, Tensor] = {}

    def before(index: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[index] = inputs[0].clone()

    def after(index: int, _: nn.Module, __: Any, output: Tensor) -> None:
        seen[index] = output

    hooks = []
    for index, tap in taps.items():
        module = network.get_submodule(tap.module)
        if tap.is_input:
            hooks.append(module.register_forward_pre_hook(partial(before, index)))
        else:
            hooks.append(module.register_forward_hook(partial(after, index)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def build_readers(
    cfg: CfgNode, student: nn.Module, student_size: int, teacher: nn.Module, teacher_size: int
) -> tuple[MapReader, MapReader]:
    """Readers of as many maps of the student as of the teacher, paired from the coarsest (KD.FEATURE).

    The maps of a pair may have different sizes and channels.

    Args:
        cfg: the run's config.
        student, teacher: timm's networks.
        student_size, teacher_size: sides of their images.
    Raises:
        UserError: a network without maps, or lists of other lengths or numbers than there are maps.
    """
    node, sides = cfg.KD.FEATURE, []
    for name, network, size, chosen in (
        ("STUDENT", student, student_size, node.STUDENT_MAPS),
        ("TEACHER", teacher, teacher_size, node.TEACHER_MAPS),
    ):
        before_activation = node.PREACT == "both" or (node.PREACT == "teacher" and name == "TEACHER")
        sides.append(read_stages(network, size, before_activation, name.lower()))
        count = len(sides[-1].indices)
        if any(not isinstance(index, int) or not 0 <= index < count for index in chosen):
            raise UserError(
                f"KD.FEATURE.{name}_MAPS is {list(chosen)}, but the {name.lower()} {type(network).__name__} has maps 0 "
                f"to {count - 1}"
            )
    lists = [list(node.STUDENT_MAPS), list(node.TEACHER_MAPS)]
    if len(lists[0]) != len(lists[1]):
        raise UserError(
            f"KD.FEATURE.STUDENT_MAPS {lists[0]} and TEACHER_MAPS {lists[1]} must name as many maps, in pairs, or be "
            "empty both"
        )
    for name, chosen in zip(("STUDENT", "TEACHER"), lists, strict=True):
        if chosen != sorted(set(chosen)):
            raise UserError(f"KD.FEATURE.{name}_MAPS is {chosen}: list the maps from fine to coarse, each once")
    if not lists[0]:
        levels = min(LEVELS, *(len(side.indices) for side in sides))
        lists = [list(side.indices[-levels:]) for side in sides]
    return tuple(choose(side, indices) for side, indices in zip(sides, lists, strict=True))


def choose(reader: MapReader, indices: Sequence[int]) -> MapReader:
    """The reader of some of its stages only."""
    taps = {index: tap for index, tap in reader.taps.items() if index in indices}
    channels = (*(reader.channels[index] for index in indices), reader.channels[-1])
    return MapReader(tuple(indices), taps, channels)


@torch.no_grad()
def read_stages(network: nn.Module, size: int, before_activation: bool, name: str) -> MapReader:
    """The reader of all stages of a network, found by running it on an image of `size`, once.

    Before the activation: a network may name the modules whose outputs these maps are (`PREACTIVATIONS`, as the papers'
    networks do). Else, where the last module of a stage is an activation, it is that module's input; a stage that ends
    with a sum or a norm has no activation to go back over.

    Raises:
        UserError: the network has no `forward_intermediates` of timm's, or it does not lead to the logits.
    """
    was_training = network.training
    parameter = next(network.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, getattr(network, "in_chans", 3), size, size, generator=generator).to(parameter)
    network.eval()
    try:
        ends: dict[int, str] = {}  # of an activation's output, by its identity
        kept: list[Tensor] = []  # alive, so that no identity comes twice
        hooks = [
            module.register_forward_hook(partial(note_output, ends, kept, path))
            for path, module in network.named_modules()
            if isinstance(module, ACTIVATIONS)
        ]
        try:
            last, maps = network.forward_intermediates(image)
        finally:
            for hook in hooks:
                hook.remove()
        logits, pooled = run_head(network, last)
        if any(m.ndim != 4 for m in maps) or not torch.allclose(logits, network(image), atol=1e-4):
            raise TypeError("they do not lead to its logits")
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"KD.FEATURE.NAME: the {name}'s network {type(network).__name__} gives no feature maps through timm's "
            f"forward_intermediates ({one_line(error)}): use another network, or KD.FEATURE.NAME none"
        ) from error
    finally:
        network.train(was_training)
    taps: dict[int, Tap] = {}
    if before_activation and getattr(network, "PREACTIVATIONS", ()):
        taps = {index: Tap(module, is_input=False) for index, module in enumerate(network.PREACTIVATIONS)}
    elif before_activation:
        taps = {index: Tap(ends[id(m)], is_input=True) for index, m in enumerate(maps) if id(m) in ends}
    return MapReader(tuple(range(len(maps))), taps, (*(m.shape[1] for m in maps), pooled.shape[1]))


def note_output(ends: dict[int, str], kept: list[Tensor], path: str, _: nn.Module, __: Any, output: Tensor) -> None:
    """A forward hook: note which activation made `output`."""
    ends.setdefault(id(output), path)
    kept.append(output)
