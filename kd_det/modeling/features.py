"""The feature loss of a detector: maps of the student's backbone against each teacher's, matched by stride."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_core.losses import FeatureLoss
from kd_core.utils.errors import UserError
from kd_det.modeling.aekt import drop_keys
from kd_det.modeling.teacher.view import TeacherView

ATTRIBUTE = "feature"  # of the student, which holds the loss
Pairs = dict[int, tuple[str, str]]  # stride → names of the student's and the teacher's map, fine to coarse
Sizes = Sequence[tuple[int, int]]  # height and width of each image


class BackboneFeatures(nn.Module):
    """A feature loss for each teacher, on the student's maps and that teacher's of the same stride.

    Student and teacher may differ in channels, in levels and in the size of their images: a level that only one of them
    has is left out. Where maps of a pair have different sizes, both are cut to the images, without the padding, and
    the loss resizes the student's.

    Args:
        build: (student's channels, teacher's channels) → the loss.
        student: the maps of the student's backbone (detectron2's `output_shape()`).
        teachers: those of each teacher's.
        names: of the student's maps that are compared; empty for all.

    Raises:
        UserError: a name that the student does not have, or no common stride.
    """

    def __init__(
        self,
        build: Callable[[list[int], list[int]], FeatureLoss],
        student: Mapping[str, ShapeSpec],
        teachers: Sequence[Mapping[str, ShapeSpec]],
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.pairs = [match_strides(student, teacher, names) for teacher in teachers]
        self.losses = nn.ModuleList()
        for pairs, teacher in zip(self.pairs, teachers, strict=True):
            channels = [(student[ours].channels, teacher[theirs].channels) for ours, theirs in pairs.values()]
            self.losses.append(build(*map(list, zip(*channels, strict=True))))

    @property
    def streams(self) -> dict[str, str]:
        """The gradient stream of every term."""
        return self.losses[0].streams

    def compare(
        self,
        views: Iterator[TeacherView],
        student: Mapping[str, Tensor],
        progress: float | None,
        losses: dict[str, Tensor],
    ) -> Iterator[TeacherView]:
        """Pass the teachers' views on; before each, add `loss_kd_<term>`, the mean over the teachers, to `losses`.

        Nothing here keeps a view or its maps once the next is asked for.
        """
        numbers = iter(range(len(self.losses)))
        for view in views:  # zip and enumerate would keep the last view
            number = next(numbers)
            terms = self.losses[number](*self.matched_maps(number, student, view), progress)
            for name, value in terms.items():
                key = f"loss_kd_{name}"
                losses[key] = losses.get(key, 0) + value / len(self.losses)
            yield view
            del view  # before the next is made

    def matched_maps(
        self, number: int, student: Mapping[str, Tensor], view: TeacherView
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The maps of the student and of teacher `number`, level by level."""
        view.scale()  # refuses images of different scales
        strides, names = list(self.pairs[number]), list(self.pairs[number].values())
        ours, theirs = [student[name] for name, _ in names], [view.features[name] for _, name in names]
        if any(s.shape[2:] != t.shape[2:] for s, t in zip(ours, theirs, strict=True)):
            ours = cut_to_images(ours, strides, view.student_sizes)
            theirs = cut_to_images(theirs, strides, view.sizes)
        return ours, theirs


def match_strides(student: Mapping[str, ShapeSpec], teacher: Mapping[str, ShapeSpec], names: Sequence[str]) -> Pairs:
    """The student's maps and the teacher's of the same stride, each in pixels of its own image, fine to coarse."""
    unknown = [name for name in names if name not in student]
    if unknown:
        raise UserError(f"KD.FEATURE.IN_FEATURES names {unknown[0]!r}, but the student's maps are {', '.join(student)}")
    ours = {student[name].stride: name for name in (names or student)}
    theirs = {shape.stride: name for name, shape in teacher.items()}
    pairs = {stride: (ours[stride], theirs[stride]) for stride in sorted(ours) if stride in theirs}
    if not pairs:
        sides = [", ".join(f"{name} (stride {stride})" for stride, name in side.items()) for side in (ours, theirs)]
        raise UserError(
            f"KD.FEATURE.NAME: the student's maps {sides[0]} and the teacher's {sides[1]} have no stride in common: "
            "use another backbone on one side, or set KD.FEATURE.NAME none"
        )
    return pairs


def cut_to_images(maps: Sequence[Tensor], strides: Sequence[int], sizes: Sizes) -> list[Tensor]:
    """Maps without what lies outside of the largest image: padding differs with the backbone and the images' size."""
    height, width = (max(side) for side in zip(*sizes, strict=True))
    rows = zip(maps, strides, strict=True)
    return [m[:, :, : math.ceil(height / stride), : math.ceil(width / stride)] for m, stride in rows]


@contextmanager
def capture_backbone(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the maps that `model.backbone` returns in one forward pass.

    The backbone is shadowed on the instance, not hooked: a compiled one would compile a hook, too, every time anew.
    """
    seen: dict[str, Tensor] = {}
    model.__dict__["backbone"] = Recorder(model.backbone, seen)
    try:
        yield seen
    finally:
        del model.__dict__["backbone"]


class Recorder:
    """Calls a backbone and keeps what it returns; in all else it is that backbone."""

    def __init__(self, backbone: nn.Module, seen: dict[str, Tensor]) -> None:
        self.backbone, self.seen = backbone, seen

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        maps = self.backbone(*args, **kwargs)
        self.seen.update(maps)
        return maps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)


def keep_feature_out_of_state_dict(model: nn.Module) -> None:
    """Leave the loss's parameters out of `model.state_dict()`; loading one leaves them as they are."""
    model.register_state_dict_post_hook(drop_feature)
    model.register_load_state_dict_pre_hook(keep_feature)


def drop_feature(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The state dict's post-hook."""
    drop_keys(state, f"{prefix}{ATTRIBUTE}.")


def keep_feature(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """The pre-hook of loading."""
    own = getattr(model, ATTRIBUTE).state_dict()
    state.update((f"{prefix}{ATTRIBUTE}.{key}", value) for key, value in own.items())
