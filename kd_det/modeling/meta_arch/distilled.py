"""What every distilled meta-architecture has: teachers, a loss on logits, the training's progress."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_core.losses import FeatureLoss
from kd_core.losses.feature_config import distils
from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError
from kd_det.config import build_feature, build_logit_loss
from kd_det.modeling.features import BackboneFeatures, capture_backbone, keep_feature_out_of_state_dict
from kd_det.modeling.meta_arch.registry import BOX_CLASSES
from kd_det.modeling.rows import Rows
from kd_det.modeling.teacher.teacher import PrefetchedView, Teacher, mean_of_teachers
from kd_det.modeling.teacher.view import TeacherView

TEACHERS_MEANS = ("log_probs", "losses")


class Distilled:
    """Mixin of a meta-architecture that learns from teachers; it stands before detectron2's class:

        class DistilledRCNN(Distilled, GeneralizedRCNN)

        losses = the plain class's losses + {loss_kd_<term>: term(student_logits, teacher_logits, target)}
               + {loss_kd_<term>: term(student's feature maps, teacher's)}

    A subclass says where its rows come from: `capture` reads the student's logits during the ordinary forward pass,
    and `teacher_logits` computes a teacher's on the same rows. In eval mode, and without a loss, the model equals
    the plain class to the bit and needs no teacher. docs/new_meta_architecture.md has a whole subclass.

    Args:
        loss: maps (student_logits, teacher_logits, target, progress) to named scalar terms; None for no such loss.
        teacher: the frozen model, or several; not part of `parameters()`, `state_dict()` or `train()`.
        max_iter: length of the training, for `progress` = iteration / max_iter; None passes no progress to the loss.
        teachers_mean: of several teachers: "log_probs", their mean is the target; "losses", the losses are averaged.
        overlap: on CUDA, run the first teacher's backbone on a second stream beside the student's forward pass.
        feature: (channels of the student's maps, of the teacher's) → a `FeatureLoss` on the backbones' maps, whose
            parameters are trained and are not in `state_dict()`; None for none.
        in_features: names of the student's maps that it compares; empty for all that the teacher has, too.
        kwargs: those of the plain class.

    Raises:
        UserError: a loss without a teacher, or an unknown value of an option.
    """

    distils: ClassVar[bool] = True
    # Config keys of the number of classes, in which student and teacher must agree; a loss is built for the first.
    class_keys: ClassVar[tuple[str, ...]] = BOX_CLASSES
    option_keys: ClassVar[tuple[str, ...]] = ()  # keys of KD that not every architecture reads, and groups of them
    background: ClassVar[int] = 1  # classes that the logits have besides
    teacher_types: ClassVar[tuple[type, ...]] = (nn.Module,)  # plain classes whose models can teach
    sigmoid = False  # whether every class is a distribution of its own

    @configurable
    def __init__(
        self,
        *,
        loss: nn.Module | None = None,
        teacher: Teacher | Sequence[Teacher] | None = None,
        max_iter: int | None = None,
        teachers_mean: str = "log_probs",
        overlap: bool = False,
        feature: Callable[[list[int], list[int]], FeatureLoss] | None = None,
        in_features: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teachers = [teacher] if isinstance(teacher, Teacher) else list(teacher or [])
        if (loss is not None or feature is not None) and not self.teachers:
            raise UserError("A distillation loss needs a teacher: pass teacher=Teacher(model), or loss=None")
        check_option("TEACHERS_MEAN", teachers_mean, TEACHERS_MEANS)
        self.loss, self.max_iter = loss, max_iter
        self.logit_classes = 0  # of the rows that were distilled last, with a background where they have one
        self.teachers_mean, self.overlap = teachers_mean, overlap
        self.checked: set[Teacher] = set()  # by `check_teacher`, which may wait for the device
        self.feature, self.feature_problem = None, None
        if feature is not None:
            self.add_feature(feature, in_features)
            if both := set(getattr(loss, "streams", ())) & set(getattr(self.feature, "streams", ())):
                raise UserError(f"KD.LOSS and KD.FEATURE both have a term {min(both)}: one would replace the other")

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        loss = cls.build_loss(cfg)
        return {
            **super().from_config(cfg),
            "loss": loss,
            "teacher": Teacher.from_config(cfg) if distils(cfg.KD) else None,
            "feature": build_feature(cfg),
            "in_features": cfg.KD.FEATURE.IN_FEATURES,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "teachers_mean": cfg.KD.TEACHERS_MEAN,
            "overlap": cfg.KD.TEACHER.OVERLAP,
        }

    @classmethod
    def build_loss(cls, cfg: CfgNode) -> nn.Module | None:
        """The loss of `cfg.KD.LOSS` for the classes of this architecture; None for "none"."""
        return build_logit_loss(cfg, lookup(cfg, cls.class_keys[0]) + cls.background)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """Raise a UserError where a key of KD that this architecture reads has a value it does not know."""
        check_option("TEACHERS_MEAN", cfg.KD.TEACHERS_MEAN, TEACHERS_MEANS)

    def add_feature(self, build: Callable[[list[int], list[int]], FeatureLoss], names: Sequence[str]) -> None:
        """Build the feature loss for the maps of the student and its teachers.

        An optimizer must find its parameters, so it is built with the model; but inference needs no teacher, so a
        teacher that is not there, or cannot be built, is an error of the training alone (`load_teacher`).
        """
        try:
            shapes = [teacher.output_shape() for teacher in self.teachers]
            self.feature = BackboneFeatures(build, self.backbone.output_shape(), shapes, names)
        except Exception as error:  # a teacher's config and code may raise anything
            self.feature_problem = error
        else:
            keep_feature_out_of_state_dict(self)

    def streams(self) -> dict[str, str]:
        """The gradient stream of every term of the losses."""
        found: dict[str, str] = {}
        for part in (self.loss, self.feature):
            found |= part.streams if part is not None else {}
        return found

    def capture(self) -> AbstractContextManager[Any]:
        """A context in which one forward pass of the student is recorded, as `distillation_losses` takes it.

        By default that is a list of `Rows`, filled when the context closes.
        """
        raise NotImplementedError

    def teacher_logits(self, view: TeacherView, rows: Sequence[Rows]) -> Sequence[Tensor]:
        """A teacher's logits on each of `rows`, shaped as the student's."""
        raise NotImplementedError

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As the plain class's: a dict of scalar losses in training, results in eval mode."""
        if not self.training or all(part is None for part in (self.loss, self.feature, self.feature_problem)):
            return super().forward(batched_inputs)
        self.load_teacher()
        # Moved to the device once, for the student and its teachers.
        batched_inputs = [{**item, "image": item["image"].to(self.device)} for item in batched_inputs]
        views = self.teacher_views(batched_inputs)
        rows = nullcontext() if self.loss is None else self.capture()
        maps = nullcontext() if self.feature is None else capture_backbone(self)
        with rows as captured, maps as student_maps:
            losses = super().forward(batched_inputs)
        if self.feature is not None:
            views = self.feature.compare(views, student_maps, self.progress(), losses)
        if self.loss is not None:
            losses.update(self.distillation_losses(views, captured))
        else:
            deque(views, maxlen=0)  # each is compared as it passes
        return losses

    def teacher_views(self, batched_inputs: list[dict[str, Any]]) -> Iterator[TeacherView]:
        """Each teacher's view of the batch, made when the iterator reaches it; with `overlap` the first starts now."""
        channels = getattr(self, "input_format", None)
        first, *others = (partial(teacher.view, batched_inputs, channels) for teacher in self.teachers)
        if self.overlap and self.device.type == "cuda":
            first = PrefetchedView(self.device, first).wait
        return (make() for make in [first, *others])

    def distillation_losses(self, views: Iterable[TeacherView], captured: Sequence[Rows]) -> dict[str, Tensor]:
        """The weighted terms of the distillation loss on all rows; terms of equal names add up.

        Args:
            views: what each teacher sees of the batch.
            captured: the student's rows.
        """
        self.logit_classes = captured[0].student_logits.shape[1] if captured else 0
        teacher_logits = []
        for view in views:
            teacher_logits.append(self.teacher_logits(view, captured))
            del view  # frees its feature maps before the loop makes the next teacher's
        losses = {}
        for rows, logits in zip(captured, zip(*teacher_logits, strict=True), strict=True):
            for term, value in self.terms(rows, logits).items():
                name = f"loss_kd_{term}{rows.suffix}"
                losses[name] = losses[name] + value if name in losses else value
        return losses

    def terms(self, rows: Rows, teacher_logits: Sequence[Tensor]) -> dict[str, Tensor]:
        """The loss of rows against the logits of each teacher, combined as `teachers_mean` says."""
        if self.teachers_mean == "log_probs":
            pixels = rows.student_logits.dim() == 4  # always a softmax, whatever the boxes of the same model have
            teacher_logits = [mean_of_teachers(teacher_logits, self.sigmoid and not pixels)]
        found = [self.row_loss(rows, logits) for logits in teacher_logits]
        return {term: sum(terms[term] for terms in found) / len(found) for term in found[0]}

    def row_loss(self, rows: Rows, teacher_logits: Tensor) -> dict[str, Tensor]:
        """The loss of rows against one teacher's logits."""
        weights = {} if rows.weights is None else {"row_weights": rows.weights}
        return self.loss(rows.student_logits, teacher_logits, rows.target, self.progress(), **weights)

    def progress(self) -> float | None:
        """Share of the training that is done, from the trainer's own counter.

        Not a property: TorchScript evaluates every property of a module, also outside training.
        """
        return None if self.max_iter is None else get_event_storage().iter / self.max_iter

    @property
    def teacher(self) -> Teacher | None:
        """The teacher, the first of several; None without one."""
        return self.teachers[0] if self.teachers else None

    def load_teacher(self) -> None:
        """Build, load and check every teacher, once. The trainer calls it early, to show errors before training."""
        if self.feature_problem is not None:
            raise self.feature_problem
        for teacher in self.teachers:
            model = teacher.load(self.device, self.pixel_mean.dtype)
            if self.loss is not None and teacher not in self.checked:
                self.check_teacher(model)
                self.checked.add(teacher)

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise a UserError where a teacher cannot teach this student its logits."""
        if not isinstance(teacher, self.teacher_types):
            expected = " or ".join(cls.__name__ for cls in self.teacher_types)
            raise UserError(
                f"The teacher of a {type(self).__name__} must be a {expected}, but KD.TEACHER.CONFIG_FILE builds a "
                f"{type(teacher).__name__}: name a config with such a MODEL.META_ARCHITECTURE"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "Distilled":
        super()._apply(fn, *args, **kwargs)
        for teacher in self.__dict__.get("teachers", ()):
            teacher.apply(fn)
        return self


def check_option(key: str, value: str, known: Sequence[str]) -> None:
    """Raise a UserError where an option of KD has an unknown value."""
    if value not in known:
        raise UserError(f"KD.{key} is {value!r}, expected {' or '.join(known)}")
