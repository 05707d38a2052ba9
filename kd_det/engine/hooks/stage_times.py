"""Where an iteration's time goes."""

import time
from itertools import pairwise
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.utils.hooks import RemovableHandle

STAGES = ("forward", "backward", "step")


class StageTimes(HookBase):
    """Puts `time/forward`, `time/backward` and `time/step` (seconds of an iteration) into the event storage.

    forward: the losses, the teacher's part included. backward: from there to the optimizer, the reduction over the
    processes, the reading of the losses and clipping included. step: the optimizer. detectron2 has `time` (all of it),
    `data_time` (waiting for images) and `eta_seconds`. Micro-batches add up.

    On a GPU, marks are events in its own queue, read an iteration later: nothing waits for them.
    """

    def __init__(self) -> None:
        self.marks: list[tuple[str, Any]] = []  # (stage that begins, when) of this iteration
        self.previous: list[tuple[str, Any]] = []  # of the one before, which the device has finished
        self.handles: list[RemovableHandle] = []

    def before_train(self) -> None:
        step = self.trainer._trainer
        self.cuda = next(step.model.parameters()).is_cuda
        if comm.is_main_process():
            self.handles = [
                step.model.register_forward_pre_hook(lambda *_: self.mark("forward")),
                step.model.register_forward_hook(lambda *_: self.mark("backward")),
                step.optimizer.register_step_pre_hook(lambda *_: self.mark("step")),
            ]
            step.before_data = lambda: self.mark("data")

    def before_step(self) -> None:
        self.mark("data")

    def after_step(self) -> None:
        self.mark("")
        if comm.is_main_process() and self.previous:
            seconds = stage_seconds(self.previous)
            self.trainer.storage.put_scalars(**{f"time/{stage}": seconds[stage] for stage in STAGES})
        self.previous, self.marks = self.marks, []

    def after_train(self) -> None:
        for handle in self.handles:
            handle.remove()

    def mark(self, stage: str) -> None:
        """`stage` begins now."""
        if self.cuda:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((stage, now))


def stage_seconds(marks: list[tuple[str, Any]]) -> dict[str, float]:
    """Seconds of every stage between its marks and the next ones; 0 for a stage without any."""
    seconds = dict.fromkeys(("data", *STAGES), 0.0)
    for (stage, start), (_, end) in pairwise(marks):
        seconds[stage] += end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
    return seconds
