"""`DistilledSemanticSegmentor` and `DistilledPanopticFPN`: segmentation whose pixels also learn from a teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, PanopticFPN, SemanticSegmentor
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.config import build_logit_loss
from kd_det.modeling.meta_arch.distilled import Distilled
from kd_det.modeling.meta_arch.rcnn import DistilledRCNN
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES
from kd_det.modeling.pixels import (
    PixelMap,
    PixelOptions,
    capture_pixels,
    check_pixel_loss,
    pixel_rows,
    teacher_map,
)
from kd_det.modeling.rows import Rows
from kd_det.modeling.teacher.view import TeacherView


@META_ARCH_REGISTRY.register()
class DistilledSemanticSegmentor(Distilled, SemanticSegmentor):
    """A SemanticSegmentor trained on its own loss plus a distillation loss on the logits of its pixels.

    Rows are the pixels of the student's logits, at the stride of its head (GDKD, arXiv 2512.04625, segmentation code).
    The teacher's logits are brought to the student's grid by bilinear interpolation. With N pixels that count,

        losses = SemanticSegmentor's losses + {loss_kd_<term>: term(student_logits, teacher_logits, labels)}
        student_logits (N, C), teacher_logits (N, C), labels (N,)

    Any `sem_seg_head` serves that computes its loss in `losses(predictions, targets)`, as all of detectron2's do.

    Args:
        pixels: which pixels are rows.
        input_format: channel order of the images, which a teacher's may differ from.
        kwargs: those of `Distilled` and of SemanticSegmentor.
    """

    class_keys = (PIXEL_CLASSES,)
    option_keys = ("KD.PIXELS",)
    background = 0
    teacher_types = (SemanticSegmentor, PanopticFPN)

    @configurable
    def __init__(self, *, pixels: PixelOptions | None = None, input_format: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pixels, self.input_format = pixels or PixelOptions(), input_format

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        own = {"pixels": PixelOptions.from_config(cfg), "input_format": cfg.INPUT.FORMAT}
        return {**super().from_config(cfg), **own}

    @classmethod
    def build_loss(cls, cfg: CfgNode) -> nn.Module | None:
        """See `Distilled`; refuses losses that are defined on boxes."""
        loss = super().build_loss(cfg)
        check_pixel_loss(cfg, loss)
        return loss

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """See `Distilled`."""
        super().check_config(cfg)
        PixelOptions.from_config(cfg)

    def capture(self) -> AbstractContextManager[list[PixelMap]]:
        """Record the head's logits and labels."""
        return capture_pixels(self.sem_seg_head)

    def teacher_logits(self, view: TeacherView, rows: Sequence[PixelMap]) -> list[Tensor]:
        """The teacher's logits on the student's grid."""
        return [teacher_map(view, pixels) for pixels in rows]

    def distillation_losses(self, views: Iterable[TeacherView], captured: Sequence[PixelMap]) -> dict[str, Tensor]:
        """See `Distilled`; a head that did not call its `losses` is refused."""
        return super().distillation_losses(views, refuse_none(captured, self.sem_seg_head))

    def row_loss(self, rows: PixelMap, teacher_logits: Tensor) -> dict[str, Tensor]:
        """The loss of the pixels that count."""
        kept = pixel_rows(rows, teacher_logits, self.pixels, self.sem_seg_head.ignore_value)
        return self.loss(*kept, self.progress())


@META_ARCH_REGISTRY.register()
class DistilledPanopticFPN(DistilledRCNN, PanopticFPN):
    """A PanopticFPN whose box head and pixels learn from a teacher's: `DistilledRCNN` and `DistilledSemanticSegmentor`.

        losses = PanopticFPN's losses + box_weight · {loss_kd_<term>} + pixel_weight · {loss_kd_<term>_pixels}

    Args:
        pixels: which pixels are rows.
        box_weight, pixel_weight: of the two distillations.
        kwargs: those of DistilledRCNN and of PanopticFPN.
    """

    class_keys = (*DistilledRCNN.class_keys, PIXEL_CLASSES)
    option_keys = (*DistilledRCNN.option_keys, "KD.PIXELS", "KD.PANOPTIC")
    teacher_types = (PanopticFPN,)

    @configurable
    def __init__(
        self,
        *,
        pixels: PixelOptions | None = None,
        box_weight: float = 1.0,
        pixel_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.pixels, self.box_weight, self.pixel_weight = pixels or PixelOptions(), box_weight, pixel_weight
        self.pixel_loss = kwargs.get("loss")  # `loss` has a binary form where the boxes have sigmoids; pixels have none

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.KD.PANOPTIC
        own = {"box_weight": node.BOX_WEIGHT, "pixel_weight": node.PIXEL_WEIGHT}
        return {**super().from_config(cfg), "pixels": PixelOptions.from_config(cfg), **own}

    @classmethod
    def build_loss(cls, cfg: CfgNode) -> nn.Module | None:
        """See `Distilled`; the loss must be defined on the classes of boxes and on those of pixels."""
        check_pixel_loss(cfg, build_logit_loss(cfg, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES))
        return super().build_loss(cfg)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """See `Distilled`."""
        super().check_config(cfg)
        PixelOptions.from_config(cfg)
        for key, weight in cfg.KD.PANOPTIC.items():
            if weight < 0:
                raise UserError(f"KD.PANOPTIC.{key} is {weight}: a weight is not below 0")

    @contextmanager
    def capture(self) -> Iterator[tuple[Any, list[PixelMap]]]:
        """Record what both distillations need."""
        with super().capture() as boxes, capture_pixels(self.sem_seg_head, suffix="_pixels") as maps:
            yield boxes, maps

    def distillation_losses(
        self, views: Iterable[TeacherView], captured: tuple[Any, list[PixelMap]]
    ) -> dict[str, Tensor]:
        """The weighted terms of both distillations."""
        boxes, maps = captured
        views, stages = self.box_rows(views, boxes)
        return Distilled.distillation_losses(self, views, [*stages, *refuse_none(maps, self.sem_seg_head)])

    def teacher_logits(self, view: TeacherView, rows: Sequence[Rows]) -> list[Tensor]:
        """The teacher's box head on the boxes of every stage, and its pixels on the student's grid."""
        *stages, pixels = rows
        return [*super().teacher_logits(view, stages), teacher_map(view, pixels)]

    def row_loss(self, rows: Rows, teacher_logits: Tensor) -> dict[str, Tensor]:
        """The loss of boxes, or of pixels, with its weight."""
        if isinstance(rows, PixelMap):
            kept = pixel_rows(rows, teacher_logits, self.pixels, self.sem_seg_head.ignore_value)
            terms, weight = self.pixel_loss(*kept, self.progress()), self.pixel_weight
        else:
            terms, weight = super().row_loss(rows, teacher_logits), self.box_weight
        return {name: weight * term for name, term in terms.items()}


def refuse_none(maps: Sequence[PixelMap], head: nn.Module) -> Sequence[PixelMap]:
    """The maps; a UserError where the head's forward pass has recorded none."""
    if not maps:
        raise UserError(
            f"{type(head).__name__} did not call losses(predictions, targets), where distillation reads the student's "
            "logits: use a head that does, or KD.LOSS.NAME none"
        )
    return maps
