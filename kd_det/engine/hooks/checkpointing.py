"""Training hooks around checkpoints: seeds that a resumed run repeats, the student's config, the best weights."""

import math
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn

from kd_core.utils.files import write_whole
from kd_core.utils.rng import mix_seed_32
from kd_det.config.student import student_config, write_student
from kd_det.evaluation.figures import MAIN_FIGURES


class SeedEachStep(HookBase):
    """Makes every iteration's random numbers (proposal sampling, dropout) a function of (seed, rank, iteration).

    A resumed run then draws the same as an uninterrupted one, whatever an evaluation drew in between.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def before_step(self) -> None:
        # 31 bits: seed_all_rng also feeds numpy's legacy generator
        seed_all_rng(mix_seed_32(self.seed, comm.get_rank(), self.trainer.iter) >> 1)


class SaveStudentConfig(HookBase):
    """Writes `student.yaml`, with which plain detectron2 loads the checkpoints of this training."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def before_train(self) -> None:
        if comm.is_main_process():
            write_student(student_config(self.cfg), Path(self.cfg.OUTPUT_DIR, "student.yaml"))


class KeepBest(HookBase):
    """Saves the weights with the highest AP (mIoU, PQ) so far, under the key `AP`; must come after the evaluation.

    `--resume` does not use the file: it holds no optimizer. A resumed training continues from the AP in it.

    Args:
        path: of the file.
        model: the model to save.
        task: key of its results in the evaluation; None: the student's, "ema": the moving average's.
    """

    def __init__(self, path: Path, model: nn.Module, task: str | None = None) -> None:
        self.path, self.model, self.task = path, model, task
        self.best = -math.inf
        self.seen: Any = None

    def before_train(self) -> None:
        if self.trainer.start_iter > 0 and self.path.is_file():
            self.best = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)["AP"]
        self.keep()  # an evaluation that was made up for (hooks/evaluation.py)

    def after_step(self) -> None:
        self.keep()

    def after_train(self) -> None:
        self.keep()

    def keep(self) -> None:
        """Write the file if the last evaluation is new, and better than what is in it."""
        results = getattr(self.trainer, "_last_eval_results", None)
        if results is self.seen or not comm.is_main_process():
            return
        self.seen = results
        figure = main_figure(results.get(self.task, {}) if self.task else results)
        if figure > self.best:
            self.best = figure
            state = {"model": self.model.state_dict(), "AP": figure, "iteration": self.trainer.iter}
            write_whole(self.path, lambda file: torch.save(state, file))


def main_figure(results: dict[str, Any]) -> float:
    """PQ, box AP or mIoU in an evaluation's results, on the first of several data sets; NaN where there is none."""
    for task, figure in MAIN_FIGURES.items():
        if task in results:
            return float(results[task].get(figure, math.nan))
    return next((main_figure(of_set) for of_set in results.values() if isinstance(of_set, dict)), math.nan)
