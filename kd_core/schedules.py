"""Schedules as pure functions of training progress in [0, 1]; None means "at the end"."""


def warmup(progress: float | None, share: float) -> float:
    """Linear warm-up min(progress / share, 1) of a distillation loss (DKD, arXiv 2203.08679, released code).

    Args:
        progress: iteration / max_iter, or None for the end of training.
        share: the share of the training over which it rises, in [0, 1]; 0 for no warm-up.

    Raises:
        ValueError: `progress` is negative.
    """
    if progress is None:
        return 1.0
    if progress < 0:
        raise ValueError(f"progress is iteration / max_iter, in [0, 1], not {progress}")
    return min(progress / share, 1.0) if share > 0 else 1.0


def linear(progress: float, start: float, end: float, first: float, last: float) -> float:
    """The value at `progress` of the line from `first` at `start` to `last` at `end`, constant outside."""
    if progress >= end:
        return last
    return first if progress <= start else first + (last - first) * (progress - start) / (end - start)
