"""One iteration of a config's training as a function, to be timed and profiled."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.engine.train_step import build_step
from kd_det.engine.trainer import DistillationTrainer, per_micro_batch


@dataclass
class Iteration:
    """The training step of a config on a few batches that stay in memory; calling it runs one iteration."""

    model: nn.Module
    batches: list[list[dict[str, Any]]]
    step: SimpleTrainer
    storage: EventStorage

    def __call__(self) -> None:
        with self.storage:
            self.step.iter = self.storage.iter
            self.step.run_step()
            self.storage.step()

    def recorded(self, function: Callable[[], Any]) -> Any:
        """Call a function that logs scalars, as models in training do."""
        with self.storage:
            return function()


def build_iteration(cfg: CfgNode, batches: int = 4, learning_rate: float = 0.0) -> Iteration:
    """The iteration of `cfg`, with `batches` micro-batches of its training data in memory.

    There is no schedule. At learning rate 0 every iteration does all its work, and the weights cannot diverge.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR = learning_rate
    data = list(itertools.islice(iter(DistillationTrainer.build_train_loader(per_micro_batch(cfg))), batches))
    model = DistillationTrainer.build_model(cfg).train()
    if hasattr(model, "load_teacher"):
        model.load_teacher()
    optimizer = DistillationTrainer.build_optimizer(cfg, model)
    return Iteration(model, data, build_step(cfg, model, itertools.cycle(data), optimizer), EventStorage(0))
