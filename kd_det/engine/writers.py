"""The writer of scalars for Weights & Biases; detectron2 has console, metrics.json and TensorBoard."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from kd_core.utils.wandb import import_wandb, start_wandb


class WandbWriter(EventWriter):
    """Sends new scalars in the event storage to a run of Weights & Biases, smoothed as detectron2's writers do.

    Args:
        open_run: opens the run, which has `log(scalars, step=iteration)` and `finish()`; called with the first
            scalars, when it is known whether the training is resumed.
        window: iterations over which a noisy scalar's median is taken.
    """

    def __init__(self, open_run: Callable[[], Any], window: int = 20) -> None:
        self.open_run, self.window, self.last = open_run, window, -1
        self.run: Any = None

    def write(self) -> None:
        """Log every scalar that was put since the last call, at its own iteration."""
        if self.run is None:
            self.run = self.open_run()
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self.window).items():
            if iteration > self.last:
                new[iteration][name] = value
        for iteration in sorted(new):  # wandb requires increasing steps
            self.run.log(new[iteration], step=iteration)
        self.last = max(new, default=self.last)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def build_wandb_writers(cfg: CfgNode, start_iter: Callable[[], int]) -> list[EventWriter]:
    """A `WandbWriter` where WANDB.ENABLED asks for one; raises a UserError where its package is missing.

    Args:
        start_iter: the training's first iteration, once it is known.
    """
    if not cfg.WANDB.ENABLED:
        return []
    import_wandb()  # its absence is said now
    settings = yaml.safe_load(cfg.dump())
    return [WandbWriter(lambda: start_wandb(cfg.OUTPUT_DIR, cfg.WANDB.PROJECT, settings, start_iter()))]
