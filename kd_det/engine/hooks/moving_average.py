"""The exponential moving average of the student's weights (SOLVER.EMA)."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from kd_core.utils.state_dict import check_fit

logger = logging.getLogger(__name__)


class MovingAverage:
    """A detector with averaged weights: after each step, average ← decay · average + (1 − decay) · student.

    It starts from the weights after the first step, and averages all that a checkpoint's `model` holds (AEKT's layer
    merged, BatchNorm's statistics too). It is saved under the checkpoint's key `ema`, with GeneralizedRCNN's names;
    `model` is still the student. To get it as a file of weights,

        state = torch.load("model_final.pth", weights_only=True)
        torch.save({"model": state["ema"]}, "average.pth")

    Args:
        cfg: the training's config: SOLVER.EMA.
        student: the model that is trained.
        build: builds the student as detectron2's own detector, with any weights.
    """

    def __init__(self, cfg: CfgNode, student: nn.Module, build: Callable[[], nn.Module]) -> None:
        options = cfg.SOLVER.EMA
        self.student, self.loaded = student, False
        with torch.random.fork_rng(devices=[]):  # overwritten below: they must not advance the RNG
            plain = build()
        plain.load_state_dict(student.state_dict())
        self.average = ModelEmaV3(plain, options.DECAY, use_warmup=options.WARMUP)

    @property
    def model(self) -> nn.Module:
        """The detector with the averaged weights, in eval mode."""
        return self.average.module

    def start(self) -> None:
        """Start from the student's weights, unless a checkpoint has given the average's own."""
        if not self.loaded:
            self.average.set(self.student)

    def update(self, step: int) -> None:
        """Follow the student's weights after `step` ≥ 1 optimizer steps of the training."""
        self.average.update(self.student, step)

    def state_dict(self) -> dict[str, Tensor]:
        """GeneralizedRCNN's names."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises a UserError where the weights do not fit the student."""
        check_fit(state, self.model.state_dict(), "--resume: the moving average in the checkpoint (key ema)")
        self.model.load_state_dict(state)
        self.loaded = True


class UpdateAverage(HookBase):
    """Updates a `MovingAverage` after each step; must precede the hooks that save and evaluate."""

    def __init__(self, average: MovingAverage) -> None:
        self.average = average

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and not self.average.loaded:
            logger.warning(
                "SOLVER.EMA.ENABLED is True, but the checkpoint to resume has no moving average (key ema): it starts "
                "from the student's weights at iteration %d",
                self.trainer.start_iter,
            )
        self.average.start()

    def after_step(self) -> None:
        self.average.update(self.trainer.iter + 1)
