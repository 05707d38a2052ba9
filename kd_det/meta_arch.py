"""`DistilledRCNN`: detectron2's `GeneralizedRCNN` whose box head also learns from a teacher."""

from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .capture import BoxStage, capture_box_stages
from .config import build_box_loss
from .serialization import build_serialization, keep_out_of_state_dict, serialized_outputs
from .teacher import Teacher


@META_ARCH_REGISTRY.register()
class DistilledRCNN(GeneralizedRCNN):
    """A GeneralizedRCNN trained on its own losses plus a distillation loss on its ROI classification logits.

    The student's RPN proposals, as its ROI heads sampled and labelled them, are pooled from the teacher's features and
    classified by the teacher's box head (DKD, arXiv 2203.08679, detection code). With N sampled proposals over all
    images and C = foreground classes + background,

        losses = GeneralizedRCNN's losses + {loss_kd_<term>: term(student_logits, teacher_logits, gt_classes)}
        student_logits (N, C), teacher_logits (N, C), gt_classes (N,)

    A cascade head distils every stage, as `loss_kd_<term>_stage<k>`. The student's logits are those of the forward
    pass that happens anyway. Boxes, masks and keypoints are not distilled. In eval mode, and with `loss=None`, it is a
    GeneralizedRCNN to the bit, and needs no teacher.

    Args:
        loss: maps (student_logits, teacher_logits, target, progress) to named scalar terms; None for plain training.
        teacher: the frozen detector; not part of `parameters()`, `state_dict()` or `train()`.
        max_iter: length of the training, for `progress` = iteration / max_iter; None hands the loss no progress.
        serialize: put AEKT's layer W·z + b behind the classifiers: z is distilled, W·z + b classifies. `state_dict()`
            has them merged, under GeneralizedRCNN's names.
        kwargs: those of GeneralizedRCNN.
    """

    @configurable
    def __init__(
        self,
        *,
        loss: nn.Module | None = None,
        teacher: Teacher | None = None,
        max_iter: int | None = None,
        serialize: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if loss is not None and teacher is None:
            raise ValueError("A distillation loss needs a teacher: pass teacher=Teacher(model), or loss=None")
        self.loss = loss
        self.teacher = teacher
        self.max_iter = max_iter
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
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """As GeneralizedRCNN's: in training a dict of scalar losses, in eval mode the detections."""
        if not self.training or self.loss is None:
            return super().forward(batched_inputs)
        with capture_box_stages(self.roi_heads, self.serialization) as stages:
            losses = super().forward(batched_inputs)
        losses.update(self.distillation_losses(batched_inputs, stages))
        return losses

    def inference(self, *args: Any, **kwargs: Any) -> Any:
        """As GeneralizedRCNN's, by the logits that classify."""
        if self.serialization is None:
            return super().inference(*args, **kwargs)
        with serialized_outputs(self.roi_heads, self.serialization):
            return super().inference(*args, **kwargs)

    @property
    def no_decay(self) -> list[Tensor]:
        """Parameters not to decay (ours): decay pulls to 0, and AEKT's layer starts from the identity."""
        return [] if self.serialization is None else list(self.serialization.parameters())

    def distillation_losses(self, batched_inputs: list[dict[str, Any]], stages: list[BoxStage]) -> dict[str, Tensor]:
        """The weighted terms of the distillation loss on every stage of the box head."""
        if not stages:
            raise ValueError(
                f"{type(self.roi_heads).__name__} made no call of box_predictor.losses(predictions, proposals), where "
                "distillation reads the student's logits: use a Standard, Cascade or Res5 head, or KD.LOSS.NAME none"
            )
        self.load_teacher()
        teacher_logits = self.teacher.box_logits(batched_inputs, self.input_format, [stage.boxes for stage in stages])
        losses = {}
        for k, (stage, logits) in enumerate(zip(stages, teacher_logits, strict=True)):
            terms = self.loss(stage.student_logits, logits, stage.gt_classes, self.progress())
            suffix = f"_stage{k}" if len(stages) > 1 else ""
            losses.update((f"loss_kd_{term}{suffix}", value) for term, value in terms.items())
        return losses

    def progress(self) -> float | None:
        """Share of the training that is done, from the trainer's own counter.

        A method: TorchScript evaluates every property of a module, also outside of training.
        """
        return None if self.max_iter is None else get_event_storage().iter / self.max_iter

    def load_teacher(self) -> None:
        """Build and load the teacher, once. A trainer calls it early: what is wrong shows before training starts."""
        if self.teacher is not None:
            self.teacher.load(self.device, self.pixel_mean.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "DistilledRCNN":
        super()._apply(fn, *args, **kwargs)
        if self.__dict__.get("teacher") is not None:
            self.teacher.apply(fn)
        return self
