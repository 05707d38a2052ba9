"""Where scalars go besides the console, metrics.json and TensorBoard, which detectron2 writes."""

from collections import defaultdict
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage

from kd_core.utils.wandb import start_wandb


class WandbWriter(EventWriter):
    """Sends what is new in the event storage to a run of Weights & Biases, smoothed as detectron2's writers do.

    Args:
        run: an open run of wandb's: `log(scalars, step=iteration)` and `finish()`.
        window: iterations whose median stands for a noisy scalar.
    """

    def __init__(self, run: Any, window: int = 20) -> None:
        self.run, self.window, self.last = run, window, -1

    def write(self) -> None:
        """Log every scalar that was put since the last call, under the iteration at which it was."""
        new: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(self.window).items():
            if iteration > self.last:
                new[iteration][name] = value
        for iteration in sorted(new):  # wandb takes steps in their order
            self.run.log(new[iteration], step=iteration)
        self.last = max(new, default=self.last)

    def close(self) -> None:
        self.run.finish()


def build_wandb_writers(cfg: CfgNode) -> list[EventWriter]:
    """A `WandbWriter` where WANDB.ENABLED asks for one; raises ValueError where its package is missing."""
    if not cfg.WANDB.ENABLED:
        return []
    return [WandbWriter(start_wandb(cfg.OUTPUT_DIR, cfg.WANDB.PROJECT, yaml.safe_load(cfg.dump())))]
