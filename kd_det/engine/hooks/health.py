"""Early warnings that a training is failing."""

import logging
import math
from collections.abc import Iterator

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn

from kd_det.engine.train_step import AsyncScalars

logger = logging.getLogger(__name__)

PERIOD = 20  # iterations between two checks, as detectron2's log
PATIENCE = 4  # consecutive checks that must agree
LARGE_MAPS = 50.0  # standard deviation; an FPN over ResNet maps stays near 1
SAME_SCORES = 1e-4  # standard deviation over the boxes, of the class score that varies most
CONSTANT = 1e-6  # relative range


class WatchHealth(HookBase):
    """Warns once of each: no foreground box classified right, a box head whose scores do not depend on the box, feature
    maps that explode, a distillation term that does not change.

    It checks every `PERIOD` iterations and warns after `PATIENCE` bad checks in a row, so within 100 iterations of when
    a fault begins. The device's values are read one check late, so that the host does not wait for them.

    Args:
        model: the detector that is trained, not its DistributedDataParallel.
        start: iterations to leave out: in the warm-up a head may not have learned anything yet.
    """

    def __init__(self, model: nn.Module, start: int = 0) -> None:
        self.model, self.start = model, start
        self.seen: dict[str, Tensor] = {}
        self.pending: AsyncScalars | None = None  # what the last check has seen
        self.in_a_row: dict[str, int] = {}
        self.terms: dict[str, list[float]] = {}
        self.warned: set[str] = set()
        self.handles: list[torch.utils.hooks.RemovableHandle] = []

    def before_step(self) -> None:
        if self.trainer.iter % PERIOD == 0 and self.trainer.iter >= self.start:
            self.handles.append(self.model.backbone.register_forward_hook(self._see_maps))
            for predictor in box_predictors(self.model):
                self.handles.append(predictor.register_forward_hook(self._see_scores))

    def after_step(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.handles:
            self.handles = []
            before, self.pending = self.pending, AsyncScalars(self.seen) if self.seen else None
            self.seen = {}
            self._look({} if before is None else {name: float(value) for name, value in before.read().items()})

    def _see_maps(self, module: nn.Module, inputs: tuple, maps: dict[str, Tensor]) -> None:
        if module.training and isinstance(maps, dict):
            self.seen["maps"] = torch.stack([m.detach().float().std() for m in maps.values()]).max()

    def _see_scores(self, module: nn.Module, inputs: tuple, predictions: tuple[Tensor, Tensor]) -> None:
        scores = predictions[0].detach()
        if module.training and len(scores) > 1:
            self.seen["scores"] = scores.float().std(0).max()

    def _look(self, seen: dict[str, float]) -> None:
        latest = {name: value for name, (value, _) in self.trainer.storage.latest().items()}
        right = latest.get("fast_rcnn/fg_cls_accuracy")
        self._count(
            "no foreground box is classified right",
            right is not None and not right > 0,
            "lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, clip gradients (SOLVER.CLIP_GRADIENTS), or check that "
            "the classes of the data are those of MODEL.ROI_HEADS.NUM_CLASSES",
        )
        self._count(
            "the box head gives every box the same scores",
            "scores" in seen and not seen["scores"] > SAME_SCORES,
            "its units have died: start again with MODEL.FPN.NORM GN, a lower SOLVER.BASE_LR or a longer warm-up",
        )
        large = seen.get("maps", 0.0)
        self._count(
            f"the feature maps have a standard deviation above {LARGE_MAPS:g}",
            not large <= LARGE_MAPS,
            "set MODEL.FPN.NORM GN (maps of linear bottlenecks have no norm), or lower SOLVER.BASE_LR",
        )
        two = getattr(self.model, "logit_classes", 0) == 2  # nothing is left to compare beside the target
        for name, value in latest.items():
            if name.startswith("loss_kd_") and not (two and value == 0):
                self._count_term(name, float(value))

    def _count_term(self, name: str, value: float) -> None:
        history = self.terms.setdefault(name, [])
        history.append(value)
        del history[: -PATIENCE - 1]
        constant = len(history) > PATIENCE and not max(history) - min(history) > CONSTANT * abs(history[-1])
        if constant and not math.isnan(value):
            self._warn(
                f"{name} has not changed for {PATIENCE * PERIOD} iterations (it is {value:.3g})",
                "see that its weight under KD.LOSS is not 0 and that the teacher is trained (KD.TEACHER.EVALUATE True)",
                key=name,
            )

    def _count(self, sign: str, present: bool, cure: str) -> None:
        self.in_a_row[sign] = self.in_a_row.get(sign, 0) + 1 if present else 0
        if self.in_a_row[sign] >= PATIENCE:
            self._warn(f"for {PATIENCE * PERIOD} iterations {sign}", cure, key=sign)

    def _warn(self, what: str, cure: str, key: str) -> None:
        if key not in self.warned:
            self.warned.add(key)
            logger.warning("Iteration %d: %s. Likely cure: %s.", self.trainer.iter + 1, what, cure)


def box_predictors(model: nn.Module) -> Iterator[nn.Module]:
    """The classifiers of the box head: one, or one per cascade stage; none for a detector without ROI heads."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if predictor is not None:
        yield from predictor if isinstance(predictor, nn.ModuleList) else [predictor]
