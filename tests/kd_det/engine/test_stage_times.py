"""Where an iteration's time goes: stages are told apart, micro-batches add up, nothing is counted twice."""

import pytest
import torch
from detectron2.engine import SimpleTrainer, TrainerBase
from torch import nn

from kd_core.train_step import TrainStep
from kd_det.engine.hooks import monitoring
from kd_det.engine.hooks.monitoring import StageTimes, stage_seconds
from kd_det.engine.train_step import StreamTrainer

DATA, FORWARD, BACKWARD, STEP = 8.0, 5.0, 3.0, 1.0


class Clock:
    """Goes on only while something below is done."""

    now = 0.0

    @classmethod
    def perf_counter(cls):
        return cls.now

    @classmethod
    def sleep(cls, seconds):
        cls.now += seconds


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Clock.sleep(BACKWARD)
        return gradient


class SlowModel(nn.Linear):
    """A known time for the losses, and for their gradient."""

    def forward(self, batch):
        Clock.sleep(FORWARD)
        return {"loss_cls": SlowBackward.apply(super().forward(batch).sum())}


class SlowSGD(torch.optim.SGD):
    def step(self, closure=None):
        Clock.sleep(STEP)
        return super().step(closure)


class Trainer(TrainerBase):
    """detectron2's loop over a step of one's choice."""

    def __init__(self, step):
        super().__init__()
        self._trainer = step

    def run_step(self):
        self._trainer.iter = self.iter
        self._trainer.run_step()


def batches():
    while True:
        Clock.sleep(DATA)
        yield torch.ones(2, 3)


@pytest.mark.parametrize("micro_batches", [0, 1, 2])  # 0: detectron2's own step
def test_each_stage_is_timed_and_micro_batches_add_up(micro_batches, monkeypatch):
    monkeypatch.setattr(monitoring, "time", Clock)
    model = SlowModel(3, 1)
    optimizer = SlowSGD(model.parameters(), lr=0.1)
    if micro_batches:
        step = StreamTrainer(model, batches(), TrainStep(optimizer), {}, micro_batches)
    else:
        step = SimpleTrainer(model, batches(), optimizer)
    trainer = Trainer(step)
    trainer.register_hooks([StageTimes()])
    trainer.train(0, 3)
    times = [trainer.storage.history(f"time/{name}").latest() for name in ("forward", "backward", "step")]
    count = max(micro_batches, 1)
    assert times == [count * FORWARD, count * BACKWARD, STEP]  # the wait for images is in none
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_stage_ends_where_the_next_begins():
    marks = [
        ("data", 0.0),
        ("forward", 1.0),
        ("backward", 3.0),
        ("data", 6.0),
        ("forward", 7.0),
        ("step", 7.5),
        ("", 9.0),
    ]
    assert stage_seconds(marks) == {"data": 2.0, "forward": 2.5, "backward": 3.0, "step": 1.5}
