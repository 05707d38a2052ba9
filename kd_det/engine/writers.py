"""The writer of scalars for Weights & Biases; detectron2 has console, metrics.json and TensorBoard."""

from collections import defaultdict
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from kd_core.utils.wandb import start_wandb


class WandbWriter(EventWriter):
    """Sends new scalars in the event storage to a run of Weights & Biases, smoothed as detectron2's writers do.

    Args:
        run: an open wandb run: `log(scalars, step=iteration)` and `finish()`.
        window: iterations over which a noisy scalar's median is taken.
    """

    def __init__(self, run: Any, window: int = 20) -> None:
        self.run, self.window, self.last = run, window, -1

    def write(self) -> None:
        """Log every scalar that was put since the last call, at its own iteration."""
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self.window).items():
            if iteration > self.last:
                new[iteration][name] = value
        for iteration in sorted(new):  # wandb requires increasing steps
            self.run.log(new[iteration], step=iteration)
        self.last = max(new, default=self.last)

    def close(self) -> None:
        self.run.finish()


def build_wandb_writers(cfg: CfgNode) -> list[EventWriter]:
    """A `WandbWriter` where WANDB.ENABLED asks for one; raises a UserError where its package is missing."""
    if not cfg.WANDB.ENABLED:
        return []
    return [WandbWriter(start_wandb(cfg.OUTPUT_DIR, cfg.WANDB.PROJECT, yaml.safe_load(cfg.dump())))]
