"""The teacher: one frozen model with its own architecture, weights, channel order and normalisation."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.config import kd_defaults
from kd_det.modeling.sigmoid_loss import as_wide
from kd_det.modeling.teacher.acceleration import TeacherSpeed, accelerate_teacher
from kd_det.modeling.teacher.build import backbone_shape, teacher_builders
from kd_det.modeling.teacher.view import TEACHER_IMAGE, TeacherView


class Teacher:
    """A frozen model of detectron2's whose logits a student learns from.

    It is deliberately not an `nn.Module`: it is not part of the student's `parameters()`, `state_dict()`, `train()` and
    DistributedDataParallel, and a deep copy of the student shares it.

    Args:
        model: the model, or a function that builds it. The function is called when the teacher is first needed, so
            that inference with a student neither builds a teacher nor looks for its weights.
        own_images: refuse inputs without a `teacher_image`: a config that asks for another size must get one.
        speed: how a detector that the function builds is accelerated; a detector that is given is only frozen.
        shape: gives the maps of the backbone that the function would build, without its weights.
        input_format: channel order of the images of a student that does not say its own, as detectron2's FCOS and
            SemanticSegmentor; None: the teacher's own.
    """

    def __init__(
        self,
        model: nn.Module | Callable[[], nn.Module],
        own_images: bool = False,
        speed: TeacherSpeed | None = None,
        shape: Callable[[], dict[str, ShapeSpec]] | None = None,
        input_format: str | None = None,
    ) -> None:
        self._build = None if isinstance(model, nn.Module) else model
        self._model = freeze(model) if isinstance(model, nn.Module) else None
        self.own_images, self.speed, self._shape = own_images, speed or TeacherSpeed(), shape
        self.input_format = input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "list[Teacher]":
        """The teachers that a student's config names: the one of `KD.TEACHER`, or those of `KD.TEACHERS`."""
        own_images, speed = cfg.KD.TEACHER.IMAGE_SCALE != 1, TeacherSpeed.from_config(cfg)
        pairs = zip(teacher_builders(cfg), teacher_builders(cfg, backbone_shape), strict=True)
        return [cls(build, own_images, speed, shape, cfg.INPUT.FORMAT) for build, shape in pairs]

    @classmethod
    def from_files(
        cls,
        config_file: str,
        weights: str = "",
        overrides: Sequence[str] = (),
        num_classes: int = 80,
        input_format: str | None = None,
        allow_random: bool = False,
    ) -> "Teacher":
        """The teacher of a config file and a weights file, for a student that is built by keyword.

        Args:
            config_file, weights, overrides, allow_random: KD.TEACHER's keys of these names.
            num_classes: of the student: foreground classes, those of its pixels where the teacher has no boxes.
            input_format: channel order of its images, where it does not say so itself.
        """
        cfg = kd_defaults()
        for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET, cfg.MODEL.SEM_SEG_HEAD):
            node.NUM_CLASSES = num_classes
        cfg.MODEL.META_ARCHITECTURE = ""  # the student has no config: which of these counts, the teacher's says
        cfg.INPUT.FORMAT, cfg.MODEL.DEVICE = input_format, "cpu"
        node = cfg.KD.TEACHER
        node.CONFIG_FILE, node.WEIGHTS, node.OVERRIDES = config_file, weights, list(overrides)
        node.ALLOW_RANDOM = allow_random
        return cls.from_config(cfg)[0]

    @property
    def model(self) -> nn.Module:
        """The frozen detector, in eval mode."""
        return self.load()

    def load(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """Build, load and accelerate the detector, once.

        Args:
            device: the student's.
            dtype: the student's; not used where the teacher has a dtype of its own.
        """
        if self._model is None:
            # The initial weights must not advance the student's random numbers.
            with torch.random.fork_rng(devices=[]):
                model = freeze(self._build())
            model = model.to(device=device, dtype=None if self.speed.dtype else dtype)
            self._model = accelerate_teacher(model, self.speed)
        return self._model

    def output_shape(self) -> dict[str, ShapeSpec]:
        """The maps of the backbone, from the config where the detector is not built yet."""
        if self._model is None and self._shape is not None:
            return self._shape()
        return self.model.backbone.output_shape()

    def view(self, batched_inputs: Sequence[dict[str, Any]], input_format: str | None) -> TeacherView:
        """The batch as the teacher sees it; images in channel order `input_format`, or in that of `__init__`."""
        if self.own_images and not all(TEACHER_IMAGE in item for item in batched_inputs):
            raise UserError(
                f"KD.TEACHER.IMAGE_SCALE asks for the teacher's own size, but the inputs have no {TEACHER_IMAGE!r}: "
                "train with tools/train_net.py, or map the data with kd_det.data.TwoSizeMapper"
            )
        return TeacherView(self.model, batched_inputs, input_format or self.input_format)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Apply a `.to()`, `.double()`, … of the student, but keep the dtype where the teacher has its own.

        Norms that were folded in float32 stay rounded to it (1e-7).
        """
        if self._model is not None:
            keep_own = self.speed.dtype is not None and self._build is not None
            self._model._apply((lambda tensor: function(tensor).to(tensor.dtype)) if keep_own else function)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def freeze(model: nn.Module) -> nn.Module:
    """Eval mode, no gradients."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def mean_of_teachers(logits: Sequence[Tensor], sigmoid: bool = False) -> Tensor:
    """Logits (N, C) or (B, C, H, W) of the mean of several teachers: of their log-probabilities.

        ẑ = mean_m log softmax(z_m)        softmax(ẑ / T) ∝ ∏_m softmax(z_m / T)^(1/M) for any temperature T

    A log-softmax differs from its logits by a constant per row, so no temperature is needed here. Computed in at least
    float32. With `sigmoid` each class is a distribution of its own, and ẑ is the mean of the logits.
    """
    if len(logits) == 1:
        return logits[0]
    wide = [as_wide(z) for z in logits]
    return torch.stack(wide if sigmoid else [z.log_softmax(1) for z in wide]).mean(0)


class PrefetchedView:
    """A `TeacherView` that a second CUDA stream computes beside the student's forward pass (KD.TEACHER.OVERLAP).

    The second stream first waits for what is queued on the current one: weights and images. `wait` makes the current
    stream wait for the features, never the host. They are memory of the second stream: `record_stream` keeps it from
    being reused before the current stream has read them.

    Args:
        device: the student's, a CUDA device.
        make: makes the view, from tensors that outlive `wait`.
    """

    def __init__(self, device: torch.device, make: Callable[[], TeacherView]) -> None:
        self.device = device
        second_stream(device).wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(second_stream(device)):
            self.view: TeacherView | None = make()

    def wait(self) -> TeacherView:
        """The view, for use on the current stream; it is not kept here."""
        view, self.view = self.view, None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(second_stream(self.device))
        for feature in view.features.values():
            feature.record_stream(current)
        return view


@cache
def second_stream(device: torch.device) -> torch.cuda.Stream:
    """One second stream per device."""
    return torch.cuda.Stream(device)
