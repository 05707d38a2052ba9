"""The benchmarks measure what they say, and what they compare gives the same numbers."""

import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import timing

    return timing


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import core

    return core


def test_peak_memory_is_what_lives_at_once(timing: ModuleType) -> None:
    def step() -> None:
        first = torch.zeros(250_000)
        second = first + 1
        del first
        second.add_(1)
        torch.zeros(100_000)

    assert timing.peak_bytes(step) == pytest.approx(2_000_000, rel=0.01)


def test_the_sides_take_turns_and_give_their_own_times(timing: ModuleType) -> None:
    calls = []

    def side(name: str, seconds: float) -> None:
        calls.append(name)
        end = time.process_time() + seconds  # a sleep would take none of this process's time
        while time.process_time() < end:
            pass

    ours, theirs, ratio = timing.alternate(lambda: side("a", 0.002), lambda: side("b", 0.02), seconds=0.0, least=5)
    assert calls == ["a", "b"] * 7
    assert theirs >= 20
    assert ours < theirs
    assert ratio < 0.9


def test_a_figure_above_its_bound_is_marked_and_fails(timing: ModuleType) -> None:
    fine = timing.Comparison("kd", "2 × 3", 1.0, 2.0, 0.5, 1.1, 0.6, 0.7)
    slow = timing.Comparison("kd", "2 × 3", 3.0, 2.0, 1.5, 1.1)
    large = timing.Comparison("kd", "2 × 3", 1.0, 2.0, 0.5, None, 0.8, 0.7)
    assert [[b.holds for b in c.bounds] for c in (fine, slow, large)] == [[True, True], [False], [False]]
    assert "1.50 (≤ 1.1) **above**" in str(timing.comparison_table([fine, slow, large]))


def test_every_loss_gives_the_value_and_gradient_of_its_transcription(core: ModuleType) -> None:
    transcriptions = sys.modules["transcriptions"]
    student, teacher = torch.randn(2, 24, 31, dtype=torch.float64)
    student.requires_grad_()
    target = torch.arange(24) % 31
    target[::3] = 30
    for name, loss in core.LOSSES.items():
        transcription = getattr(transcriptions, name)
        values = sum(loss(student, teacher, target, 0.0).values()), transcription(student, teacher, target)
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
        gradients = [torch.autograd.grad(value, student)[0] for value in values]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-9)
