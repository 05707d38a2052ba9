"""Input statistics: how images are normalised, and at which size a network takes them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kd_core.utils.errors import UserError

# CIFAR-100's channel mean and standard deviation, for pixel values in [0, 1], as in the papers' released code.
CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)


class InputStats(NamedTuple):
    """How a network takes its input: mean and std of each channel (pixel values in [0, 1]), side length in pixels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int


def check_stats(mean: Sequence[Any], std: Sequence[Any], key: str) -> None:
    """Raise a UserError unless both are three numbers and every std is positive; `key` is the config node of both."""
    for name, values in (("MEAN", mean), ("STD", std)):
        if len(values) != 3 or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"{key}.{name} is {list(values)}, expected three numbers, for red, green and blue")
    if min(std) <= 0:
        raise UserError(f"{key}.STD is {list(std)}, expected numbers above 0")
