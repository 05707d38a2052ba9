"""`DistilledRCNN`: detectron2's `GeneralizedRCNN` whose box head also learns from a teacher."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.config import build_box_loss
from kd_det.modeling.aekt import build_serialization, keep_out_of_state_dict, serialized_outputs
from kd_det.modeling.box_stages import ROWS, BoxStage, capture_box_stages, capture_head_inputs, join_stages, select_rows
from kd_det.modeling.sigmoid_loss import binary_form, check_same_classifier, uses_sigmoid
from kd_det.modeling.teacher.teacher import PrefetchedView, Teacher, mean_of_teachers
from kd_det.modeling.teacher.view import TeacherView, stages_on_teacher_proposals

PROPOSALS = ("student", "student+teacher")
TEACHERS_MEANS = ("log_probs", "losses")


@META_ARCH_REGISTRY.register()
class DistilledRCNN(GeneralizedRCNN):
    """A GeneralizedRCNN trained on its own losses plus a distillation loss on its ROI classification logits.

    The student's RPN proposals, as its ROI heads sampled and labelled them, are pooled from the teacher's features and
    classified by the teacher's box head (DKD, arXiv 2203.08679, detection code). With N sampled proposals over all
    images and C = foreground classes + background,

        losses = GeneralizedRCNN's losses + {loss_kd_<term>: term(student_logits, teacher_logits, gt_classes)}
        student_logits (N, C), teacher_logits (N, C), gt_classes (N,)

    A cascade head distils every stage, as `loss_kd_<term>_stage<k>`. The student's logits are read during its ordinary
    forward pass. Boxes, masks and keypoints are not distilled. In eval mode, and with `loss=None`, it equals
    GeneralizedRCNN to the bit and needs no teacher.

    Args:
        loss: maps (student_logits, teacher_logits, target, progress) to named scalar terms; None for plain training.
        teacher: the frozen detector, or several; not part of `parameters()`, `state_dict()` or `train()`.
        max_iter: length of the training, for `progress` = iteration / max_iter; None passes no progress to the loss.
        serialize: put AEKT's layer W·z + b behind the classifiers: z is distilled, W·z + b classifies. `state_dict()`
            has them merged, under GeneralizedRCNN's names.
        proposals: "student", or "student+teacher": also distil at the boxes of the teacher's RPN.
        rows: "all", "foreground", or "weighted": background rows have the weight `background_weight` (`select_rows`).
        background_weight: see `rows`.
        teachers_mean: of several teachers: "log_probs", their mean is the target; "losses", the losses are averaged.
        overlap: on CUDA, run the first teacher's backbone on a second stream beside the student's forward pass.
        kwargs: those of GeneralizedRCNN.

    Raises:
        UserError: a loss without a teacher, or an unknown value of an option.
    """

    @configurable
    def __init__(
        self,
        *,
        loss: nn.Module | None = None,
        teacher: Teacher | Sequence[Teacher] | None = None,
        max_iter: int | None = None,
        serialize: bool = False,
        proposals: str = "student",
        rows: str = "all",
        background_weight: float = 1.0,
        teachers_mean: str = "log_probs",
        overlap: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.teachers = [teacher] if isinstance(teacher, Teacher) else list(teacher or [])
        if loss is not None and not self.teachers:
            raise UserError("A distillation loss needs a teacher: pass teacher=Teacher(model), or loss=None")
        check_options(proposals, rows, teachers_mean, background_weight)
        self.sigmoid = uses_sigmoid(self.roi_heads)
        self.loss = binary_form(loss) if self.sigmoid and loss is not None else loss
        self.max_iter = max_iter
        self.proposals, self.rows, self.background_weight = proposals, rows, background_weight
        self.teachers_mean, self.overlap = teachers_mean, overlap
        self.serialization = build_serialization(self.roi_heads) if serialize else None
        if serialize:
            keep_out_of_state_dict(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        loss = build_box_loss(cfg)
        return {
            **super().from_config(cfg),
            "loss": loss,
            "teacher": Teacher.from_config(cfg) if loss is not None else None,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "serialize": cfg.KD.LOSS.NAME == "aekt",
            "proposals": cfg.KD.PROPOSALS,
            "rows": cfg.KD.ROWS,
            "background_weight": cfg.KD.BACKGROUND_WEIGHT,
            "teachers_mean": cfg.KD.TEACHERS_MEAN,
            "overlap": cfg.KD.TEACHER.OVERLAP,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As GeneralizedRCNN's: a dict of scalar losses in training, detections in eval mode."""
        if not self.training or self.loss is None:
            return super().forward(batched_inputs)
        self.load_teacher()
        # Moved to the device once, for the student and its teachers.
        batched_inputs = [{**item, "image": item["image"].to(self.device)} for item in batched_inputs]
        views = self.teacher_views(batched_inputs)
        more = capture_head_inputs(self.roi_heads) if self.proposals == "student+teacher" else nullcontext()
        with capture_box_stages(self.roi_heads, self.serialization) as stages, more as head_inputs:
            losses = super().forward(batched_inputs)
        losses.update(self.distillation_losses(views, stages, head_inputs))
        return losses

    def teacher_views(self, batched_inputs: list[dict[str, Any]]) -> Iterator[TeacherView]:
        """Each teacher's view of the batch, made when the iterator reaches it; with `overlap` the first starts now."""
        first, *others = (partial(teacher.view, batched_inputs, self.input_format) for teacher in self.teachers)
        if self.overlap and self.device.type == "cuda":
            first = PrefetchedView(self.device, first).wait
        return (make() for make in [first, *others])

    def inference(self, *args: Any, **kwargs: Any) -> Any:
        """As GeneralizedRCNN's; with AEKT's layer behind the classifiers."""
        if self.serialization is None:
            return super().inference(*args, **kwargs)
        with serialized_outputs(self.roi_heads, self.serialization):
            return super().inference(*args, **kwargs)

    @property
    def no_decay(self) -> list[Tensor]:
        """Parameters without weight decay (ours): decay pulls to 0, but AEKT's layer starts from the identity."""
        return [] if self.serialization is None else list(self.serialization.parameters())

    def distillation_losses(
        self, views: Iterable[TeacherView], stages: list[BoxStage], head_inputs: list[Any] | None = None
    ) -> dict[str, Tensor]:
        """The weighted terms of the distillation loss on every stage of the box head.

        Args:
            views: what each teacher sees of the batch.
            stages: the student's box head on its own proposals.
            head_inputs: feature maps and ground truth that its ROI heads got; needed for teachers' proposals.
        """
        if not stages:
            raise UserError(
                f"{type(self.roi_heads).__name__} did not call box_predictor.losses(predictions, proposals), where "
                "distillation reads the student's logits: use a Standard, Cascade or Res5 head, or KD.LOSS.NAME none"
            )
        if head_inputs:
            views = list(views)
            more = stages_on_teacher_proposals(self.roi_heads, *head_inputs[0], views)
            stages = [join_stages(*pair) for pair in zip(stages, more, strict=True)]
        stages = [select_rows(stage, self.rows, self.background_weight) for stage in stages]
        boxes = [stage.boxes for stage in stages]
        teacher_logits = []
        for view in views:
            teacher_logits.append(view.box_logits(boxes))
            del view  # frees its feature maps before the loop makes the next teacher's
        losses = {}
        for k, (stage, logits) in enumerate(zip(stages, zip(*teacher_logits, strict=True), strict=True)):
            suffix = f"_stage{k}" if len(stages) > 1 else ""
            losses.update((f"loss_kd_{term}{suffix}", value) for term, value in self.terms(stage, logits).items())
        return losses

    def terms(self, stage: BoxStage, teacher_logits: Sequence[Tensor]) -> dict[str, Tensor]:
        """The loss of a stage against the logits of each teacher, combined as `teachers_mean` says."""
        if self.teachers_mean == "log_probs":
            teacher_logits = [mean_of_teachers(teacher_logits, self.sigmoid)]
        weights = {} if stage.weights is None else {"row_weights": stage.weights}
        found = [
            self.loss(stage.student_logits, logits, stage.gt_classes, self.progress(), **weights)
            for logits in teacher_logits
        ]
        return {term: sum(terms[term] for terms in found) / len(found) for term in found[0]}

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
        """Build and load every teacher, once. The trainer calls it early, to show errors before training."""
        for teacher in self.teachers:
            check_same_classifier(self.roi_heads, teacher.load(self.device, self.pixel_mean.dtype).roi_heads)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DistilledRCNN":
        super()._apply(fn, *args, **kwargs)
        for teacher in self.__dict__.get("teachers", ()):
            teacher.apply(fn)
        return self


def check_options(proposals: str, rows: str, teachers_mean: str, background_weight: float) -> None:
    """Raise a UserError where an option of KD has an unknown value."""
    options = {
        "PROPOSALS": (proposals, PROPOSALS),
        "ROWS": (rows, ROWS),
        "TEACHERS_MEAN": (teachers_mean, TEACHERS_MEANS),
    }
    for key, (value, known) in options.items():
        if value not in known:
            raise UserError(f"KD.{key} is {value!r}, expected {' or '.join(known)}")
    if background_weight < 0:
        raise UserError(f"KD.BACKGROUND_WEIGHT is {background_weight}: a weight is not below 0")
