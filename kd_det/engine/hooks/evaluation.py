"""The evaluations of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils import comm

from kd_core.utils.report.runs import EVALUATED, read_lines


class Evaluate(hooks.EvalHook):
    """detectron2's EvalHook, which makes up for an evaluation that a kill interrupted.

    The checkpoint of an iteration is written before its evaluation, so that a failure of the latter loses nothing.
    `--resume` starts after both, and evaluates first where metrics.json has no results of that iteration.

    Args:
        period: iterations between evaluations.
        function: evaluates.
        metrics: the training's metrics.json.
        prefix: of the results' keys there: "ema/" for the moving average's.
    """

    def __init__(self, period: int, function: Callable[[], Any], metrics: Path, prefix: str = "") -> None:
        super().__init__(period, function)
        self.metrics, self.prefix = metrics, prefix

    def before_train(self) -> None:
        done = self.trainer.start_iter
        due = self._period > 0 and done > 0 and done % self._period == 0 and done < self.trainer.max_iter
        if due and not comm.all_gather(self.is_logged(done - 1))[0]:
            self._do_eval()

    def is_logged(self, iteration: int) -> bool:
        """Whether metrics.json has results of the evaluation after `iteration`."""
        lines = (line for line in read_lines(self.metrics) if line.get("iteration") == iteration)
        results = [key for line in lines for key in line if is_result(key)]
        return any(key.startswith("ema/") == bool(self.prefix) for key in results)


def is_result(key: str) -> bool:
    """Whether a key of metrics.json is one of an evaluator's."""
    return not set(key.split("/")[:-1]).isdisjoint(EVALUATED)
