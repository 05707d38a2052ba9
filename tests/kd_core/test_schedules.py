"""Schedules are pure functions of progress."""

import pytest

from kd_core.schedules import linear, warmup


@pytest.mark.parametrize(
    ("progress", "share", "weight"),
    [
        (0.0, 0.1, 0.0),
        (0.05, 0.1, 0.5),
        (0.1, 0.1, 1.0),
        (0.9, 0.1, 1.0),
        (0.25, 1.0, 0.25),
        (0.0, 0.0, 1.0),
        (None, 0.1, 1.0),
    ],
)
def test_warm_up_rises_linearly_to_one(progress: float | None, share: float, weight: float) -> None:
    assert warmup(progress, share) == pytest.approx(weight)


def test_the_published_warm_up_of_twenty_epochs_out_of_240() -> None:
    for epoch in (0, 1, 7, 19, 20, 100, 240):
        assert warmup(epoch / 240, 20 / 240) == pytest.approx(min(epoch / 20, 1.0))


def test_negative_progress_is_refused() -> None:
    with pytest.raises(ValueError, match=r"progress is iteration / max_iter, in \[0, 1\], not -0.5"):
        warmup(-0.5, 0.1)


def test_linear_is_constant_outside_its_interval_and_a_step_where_that_is_empty() -> None:
    values = [linear(x, 0.2, 0.4, 1.0, 3.0) for x in (0.0, 0.2, 0.3, 0.4, 1.0)]
    assert values == pytest.approx([1.0, 1.0, 2.0, 3.0, 3.0])
    assert [linear(x, 0.2, 0.2, 1.0, 3.0) for x in (0.1, 0.2)] == [1.0, 3.0]
