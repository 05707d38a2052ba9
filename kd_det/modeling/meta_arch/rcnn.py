"""`DistilledRCNN`: detectron2's `GeneralizedRCNN` whose box head also learns from a teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.modeling.aekt import build_serialization, keep_out_of_state_dict, serialized_outputs
from kd_det.modeling.box_stages import ROWS, BoxStage, capture_box_stages, capture_head_inputs, join_stages, select_rows
from kd_det.modeling.meta_arch.distilled import Distilled, check_option
from kd_det.modeling.sigmoid_loss import binary_form, check_same_classifier, uses_sigmoid
from kd_det.modeling.teacher.teacher import Teacher
from kd_det.modeling.teacher.view import TeacherView, stages_on_teacher_proposals

PROPOSALS = ("student", "student+teacher")


@META_ARCH_REGISTRY.register()
class DistilledRCNN(Distilled, GeneralizedRCNN):
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
        loss, teacher, max_iter, teachers_mean, overlap: see `Distilled`.
        serialize: put AEKT's layer W·z + b behind the classifiers: z is distilled, W·z + b classifies. `state_dict()`
            has them merged, under GeneralizedRCNN's names.
        proposals: "student", or "student+teacher": also distil at the boxes of the teacher's RPN.
        rows: "all", "foreground", or "weighted": background rows have the weight `background_weight` (`select_rows`).
        background_weight: see `rows`.
        kwargs: those of GeneralizedRCNN.

    Raises:
        UserError: a loss without a teacher, or an unknown value of an option.
    """

    option_keys = ("KD.PROPOSALS", "KD.ROWS", "KD.BACKGROUND_WEIGHT")
    teacher_types = (GeneralizedRCNN,)

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
        common = {"loss": loss, "teacher": teacher, "max_iter": max_iter}
        super().__init__(**common, teachers_mean=teachers_mean, overlap=overlap, **kwargs)
        check_options(proposals, rows, background_weight)
        self.sigmoid = uses_sigmoid(self.roi_heads)
        if self.sigmoid and loss is not None:
            self.loss = binary_form(loss)
        self.proposals, self.rows, self.background_weight = proposals, rows, background_weight
        self.serialization = build_serialization(self.roi_heads) if serialize else None
        if serialize:
            keep_out_of_state_dict(self)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {
            **super().from_config(cfg),
            "serialize": cfg.KD.LOSS.NAME == "aekt",
            "proposals": cfg.KD.PROPOSALS,
            "rows": cfg.KD.ROWS,
            "background_weight": cfg.KD.BACKGROUND_WEIGHT,
        }

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """See `Distilled`."""
        super().check_config(cfg)
        check_options(cfg.KD.PROPOSALS, cfg.KD.ROWS, cfg.KD.BACKGROUND_WEIGHT)

    @contextmanager
    def capture(self) -> Iterator[tuple[list[BoxStage], list[Any] | None]]:
        """Record the stages of the box head; with teachers' proposals also what the ROI heads get."""
        more = capture_head_inputs(self.roi_heads) if self.proposals == "student+teacher" else nullcontext()
        with capture_box_stages(self.roi_heads, self.serialization) as stages, more as head_inputs:
            yield stages, head_inputs

    def distillation_losses(
        self, views: Iterable[TeacherView], captured: tuple[list[BoxStage], list[Any] | None]
    ) -> dict[str, Tensor]:
        """The weighted terms of the distillation loss on every stage of the box head.

        Args:
            views: what each teacher sees of the batch.
            captured: the student's box head on its own proposals; feature maps and ground truth that its ROI heads
                got, where teachers' proposals are distilled, too.
        """
        return super().distillation_losses(*self.box_rows(views, captured))

    def box_rows(
        self, views: Iterable[TeacherView], captured: tuple[list[BoxStage], list[Any] | None]
    ) -> tuple[Iterable[TeacherView], list[BoxStage]]:
        """The views, and the rows of every stage of the box head that KD.PROPOSALS and KD.ROWS ask for."""
        stages, head_inputs = captured
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
        if len(stages) > 1:
            stages = [replace(stage, suffix=f"_stage{k}") for k, stage in enumerate(stages)]
        return views, stages

    def teacher_logits(self, view: TeacherView, rows: Sequence[BoxStage]) -> list[Tensor]:
        """The teacher's box head on the boxes of every stage."""
        return view.box_logits([stage.boxes for stage in rows])

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

    def check_teacher(self, teacher: nn.Module) -> None:
        """See `Distilled`; refuses ROI heads that cannot classify given boxes, and another kind of classifier."""
        super().check_teacher(teacher)
        if not isinstance(teacher.roi_heads, StandardROIHeads | Res5ROIHeads):  # cascade heads are standard heads
            raise UserError(
                f"A teacher's ROI head must be Standard, Cascade or Res5, got {type(teacher.roi_heads).__name__}"
            )
        check_same_classifier(self.roi_heads, teacher.roi_heads)


def check_options(proposals: str, rows: str, background_weight: float) -> None:
    """Raise a UserError where an option of KD has an unknown value."""
    check_option("PROPOSALS", proposals, PROPOSALS)
    check_option("ROWS", rows, ROWS)
    if background_weight < 0:
        raise UserError(f"KD.BACKGROUND_WEIGHT is {background_weight}: a weight is not below 0")
