"""`DistilledRetinaNet` and `DistilledFCOS`: one-stage detectors whose class logits also learn from a teacher."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead, permute_to_N_HWA_K
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_det.compat import FCOS, FCOSHead
from kd_det.modeling.meta_arch.distilled import Distilled, check_option
from kd_det.modeling.rows import Rows
from kd_det.modeling.sigmoid_loss import binary_form
from kd_det.modeling.teacher.view import TeacherView

ROWS = ("all", "foreground", "background")


@dataclass(frozen=True)
class LevelRows(Rows):
    """The anchors of one feature level, image by image."""

    kept: Tensor | None = None  # indices of these rows among all anchors of the level; None for all of them


class DenseDistilled(Distilled):
    """What `DistilledRetinaNet` and `DistilledFCOS` share: rows are anchors (locations), classifiers are sigmoids.

        losses = the plain detector's losses + {loss_kd_<term>: Σ over the anchors / F}

    with the terms of `BinaryDKDLoss`, and F the normalizer of the plain detector's focal loss: the moving average of
    the number of foreground anchors in a batch. An anchor that is ignored there is ignored here. The student's logits
    are those of its ordinary forward pass, and the teacher computes no boxes. Every level is a set of rows of its own,
    so that the levels' logits are not copied into one matrix.

    Args:
        gamma: γ of `BinaryDKDLoss`: background anchors outnumber the others a thousand to one, and most of them are
            easy; with γ 1 the anchors and classes count on which student and teacher differ. 0 for equal weights.
        rows: "all", "foreground" or "background" anchors, by the student's labels.
        kwargs: those of `Distilled` and of the plain detector.
    """

    class_keys = ("MODEL.RETINANET.NUM_CLASSES",)
    option_keys = ("KD.DENSE",)
    sigmoid: ClassVar[bool] = True

    @configurable
    def __init__(
        self, *, loss: nn.Module | None = None, gamma: float = 1.0, rows: str = "all", **kwargs: Any
    ) -> None:
        super().__init__(loss=dense_form(loss, gamma), **kwargs)
        check_option("DENSE.ROWS", rows, ROWS)
        self.rows = rows
        self._captured: list[LevelRows] | None = None

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "gamma": cfg.KD.DENSE.GAMMA, "rows": cfg.KD.DENSE.ROWS}

    @classmethod
    def build_loss(cls, cfg: CfgNode) -> nn.Module | None:
        """See `Distilled`; refuses a loss without a binary form."""
        return dense_form(super().build_loss(cfg), cfg.KD.DENSE.GAMMA)

    @classmethod
    def check_config(cls, cfg: CfgNode) -> None:
        """See `Distilled`; the teacher's anchors must be the student's, so it sees the student's image."""
        super().check_config(cfg)
        check_option("DENSE.ROWS", cfg.KD.DENSE.ROWS, ROWS)
        if cfg.KD.TEACHER.IMAGE_SCALE != 1:
            raise UserError(
                f"KD.TEACHER.IMAGE_SCALE is {cfg.KD.TEACHER.IMAGE_SCALE}, but {cls.__name__} learns anchor by anchor, "
                "so that its teacher must see images of the student's size: set it to 1.0"
            )

    @contextmanager
    def capture(self) -> Iterator[list[LevelRows]]:
        """Record the anchors of every level where the plain detector computes its losses."""
        self._captured = []
        try:
            yield self._captured
        finally:
            self._captured = None

    def losses(
        self, anchors: Any, pred_logits: list[Tensor], gt_labels: list[Tensor], *others: Any
    ) -> dict[str, Tensor]:
        """The plain detector's losses; records what they are computed from.

        Args:
            anchors: see detectron2.
            pred_logits: of each level (images, R, K), R anchors.
            gt_labels: of each image the class of every anchor of all levels; K for background, -1 for none.
            others: see detectron2.
        """
        losses = super().losses(anchors, pred_logits, gt_labels, *others)
        if self._captured is not None:
            labels = torch.stack(list(gt_labels)).split([level.shape[1] for level in pred_logits], dim=1)
            self._captured += [
                self.level_rows(level.flatten(0, 1), target.flatten())
                for level, target in zip(pred_logits, labels, strict=True)
            ]
        return losses

    def inference(self, anchors: Any, pred_logits: list[Tensor], *others: Any) -> Any:
        """See detectron2, whose sigmoids are in place; in training (VIS_PERIOD) the captured rows are these logits."""
        return super().inference(anchors, [x.clone() for x in pred_logits] if self.training else pred_logits, *others)

    def level_rows(self, logits: Tensor, labels: Tensor) -> LevelRows:
        """The rows (N, K) of one level that KD.DENSE.ROWS names.

        A loss divides by the number of rows; their weights N / F make it Σ / F.
        """
        foreground = (labels >= 0) & (labels < self.num_classes)
        if self.rows == "foreground":
            kept = foreground.nonzero()[:, 0]
            weights = logits.new_full((len(kept),), len(kept) / self.loss_normalizer, dtype=torch.float32)
            return LevelRows(logits[kept], labels[kept], weights, kept=kept)
        counted = labels == self.num_classes if self.rows == "background" else labels >= 0
        return LevelRows(logits, labels, counted * (len(labels) / self.loss_normalizer))

    def teacher_logits(self, view: TeacherView, rows: Sequence[LevelRows]) -> list[Tensor]:
        """The teacher's class logits on the anchors of every level."""
        teacher = view.model
        found = []
        with torch.no_grad():
            maps = class_maps(teacher.head, [view.features[name] for name in teacher.head_in_features])
            for level, level_rows in zip(maps, rows, strict=True):
                logits = permute_to_N_HWA_K(level, self.num_classes).flatten(0, 1)
                found.append(logits if level_rows.kept is None else logits[level_rows.kept])
        return found

    def check_teacher(self, teacher: nn.Module) -> None:
        """See `Distilled`; refuses a teacher with other classes, strides or anchors."""
        super().check_teacher(teacher)
        pairs = ((model.num_classes, *anchors_of(model)) for model in (self, teacher))
        for name, ours, theirs in zip(("classes", "strides", "offset", "anchors"), *pairs, strict=True):
            if ours != theirs:
                raise UserError(
                    f"The student has the {name} {ours} and its teacher {theirs}: {type(self).__name__} learns anchor "
                    "by anchor, so NUM_CLASSES, IN_FEATURES and MODEL.ANCHOR_GENERATOR of both must be equal"
                )


def dense_form(loss: nn.Module | None, gamma: float) -> nn.Module | None:
    """The binary form of a loss for logits (N, K) without a background."""
    if gamma < 0:
        raise UserError(f"KD.DENSE.GAMMA is {gamma}: the exponent of |p_T − p_S| is not below 0")
    if loss is None:
        return None
    # detectron2 made the labels: their range needs no check, which would wait for them once per level.
    return binary_form(loss, "a one-stage detector", gamma=gamma, background_logit=False, validate=False)


def anchors_of(model: nn.Module) -> tuple[list[int], float, list[list[list[float]]]]:
    """Strides, offset of the first anchor in strides, and for each level the corners of the anchors at a location, to a
    hundredth of a pixel.
    """
    generator = model.anchor_generator
    cells = [[[round(x, 2) for x in anchor] for anchor in cell.tolist()] for cell in generator.cell_anchors]
    return list(generator.strides), float(generator.offset), cells


def class_maps(head: nn.Module, features: list[Tensor]) -> list[Tensor]:
    """The class logits (images, A · K, H, W) of every level; detectron2's own heads need not compute boxes for them."""
    if type(head).forward in (RetinaNetHead.forward, getattr(FCOSHead, "forward", None)):
        return [head.cls_score(head.cls_subnet(feature)) for feature in features]
    return head(features)[0]


@META_ARCH_REGISTRY.register()
class DistilledRetinaNet(DenseDistilled, RetinaNet):
    """A RetinaNet that also learns from a RetinaNet with the same anchors, see `DenseDistilled`."""

    teacher_types = (RetinaNet,)


if FCOS is not None:

    @META_ARCH_REGISTRY.register()
    class DistilledFCOS(DenseDistilled, FCOS):
        """An FCOS that also learns from an FCOS of the same strides, see `DenseDistilled`; for LazyConfigs alone.

        A row is a location. Centerness and boxes are not distilled.
        """

        teacher_types = (FCOS,)

        @classmethod
        def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
            raise UserError(
                "MODEL.META_ARCHITECTURE DistilledFCOS: detectron2's FCOS has no yaml config; describe it in a "
                "LazyConfig and train it with tools/lazyconfig_train_net.py (docs/dense.md)"
            )
