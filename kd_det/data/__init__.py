"""Data sets of kd_det: the built-in digits, registered on import, and the user's own (`DATASETS.REGISTER`)."""

from .builtin import prepare_digits, register_digits
from .register import check_datasets, register_datasets
from .two_sizes import TwoSizeMapper

__all__ = ["TwoSizeMapper", "check_datasets", "prepare_digits", "register_datasets", "register_digits"]

register_digits()
