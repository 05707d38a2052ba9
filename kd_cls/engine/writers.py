"""Writers of metrics: log.txt and the console, metrics.json, TensorBoard, Weights & Biases, and a progress bar."""

import json
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from fvcore.common.config import CfgNode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from kd_core.utils.files import cut_metrics
from kd_core.utils.report.curves import draw_confusions
from kd_core.utils.wandb import start_wandb

logger = logging.getLogger("kd_cls")
FORMAT = logging.Formatter("[%(asctime)s] %(message)s", "%m/%d %H:%M:%S")


def setup_logging(output_dir: Path | None, is_main: bool) -> None:
    """Send the log of kd_cls and kd_core to the console and to `output_dir`/log.txt; other processes only warn."""
    if is_main and output_dir:
        output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("kd_cls", "kd_core"):
        target = logging.getLogger(name)
        target.setLevel(logging.INFO if is_main else logging.WARNING)
        target.propagate = False
        for handler in target.handlers[:]:
            target.removeHandler(handler)
            handler.close()
        handlers = [ConsoleHandler()] + (
            [logging.FileHandler(output_dir / "log.txt")] if is_main and output_dir else []
        )
        for handler in handlers:
            handler.setFormatter(FORMAT)
            target.addHandler(handler)


class ConsoleHandler(logging.Handler):
    """Prints above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


class Writers:
    """All writers of metrics, on the main process; on others, every method does nothing.

    Args:
        cfg: the run's config (OUTPUT_DIR, WANDB).
        start_iter: lines of metrics.json after it, written before a kill, are cut.
        max_iter: for the progress bar and the remaining time.
        is_main: whether this is the main process.

    Raises:
        UserError: WANDB.ENABLED without the wandb package.
    """

    def __init__(self, cfg: CfgNode, start_iter: int, max_iter: int, is_main: bool) -> None:
        self.is_main, self.max_iter = is_main, max_iter
        if not is_main:
            return
        self.started, self.start_iter = time.perf_counter(), start_iter
        self.wandb = None
        if cfg.WANDB.ENABLED:
            self.wandb = start_wandb(cfg.OUTPUT_DIR, cfg.WANDB.PROJECT, yaml.safe_load(cfg.dump()), start_iter)
        self.metrics_file = Path(cfg.OUTPUT_DIR, "metrics.json")
        cut_metrics(self.metrics_file, last=start_iter)
        self.tensorboard = SummaryWriter(cfg.OUTPUT_DIR, purge_step=start_iter + 1)
        self.bar = tqdm(
            total=max_iter, initial=start_iter, unit="it", disable=not sys.stderr.isatty(), dynamic_ncols=True
        )

    def write(self, metrics: dict[str, Any], iteration: int) -> None:
        """Write the metrics after `iteration` steps to all writers but the log."""
        if not self.is_main:
            return
        line = {"iteration": iteration, **{name: round_float(value) for name, value in metrics.items()}}
        with open(self.metrics_file, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in metrics.items():
            if isinstance(value, int | float):
                self.tensorboard.add_scalar(name, value, iteration)
        if self.wandb is not None:
            self.wandb.log(metrics, step=iteration)

    def draw_confusions(self, counts: np.ndarray, iteration: int) -> None:
        """Send TensorBoard the report's map of confusions; without matplotlib nothing is drawn."""
        if self.is_main and find_spec("matplotlib"):
            self.tensorboard.add_figure("val/confusions", draw_confusions(counts), iteration)

    def advance(self) -> None:
        """Move the progress bar by one iteration."""
        if self.is_main:
            self.bar.update()

    def log_progress(self, metrics: dict[str, float], iteration: int) -> None:
        """Write the metrics of a training step, and log them with the remaining time."""
        if not self.is_main:
            return
        self.write(metrics, iteration)
        elapsed = time.perf_counter() - self.started
        eta = elapsed / max(iteration - self.start_iter, 1) * (self.max_iter - iteration)
        values = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(values)
        logger.info("iter %d/%d  eta %s  %s", iteration, self.max_iter, tqdm.format_interval(eta), values)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.is_main:
            return
        self.bar.close()
        self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()


def round_float(value: Any) -> Any:
    """Six significant digits are enough for a log."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
