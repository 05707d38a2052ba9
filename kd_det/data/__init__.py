"""Data sets of kd_det: the built-in digits, registered on import, and the user's own (`DATASETS.REGISTER`)."""

from kd_det.data.builtin import prepare_digits, register_digit_maps, register_digits
from kd_det.data.register import check_dataset, check_datasets, check_same_classes, register_datasets
from kd_det.data.two_sizes import TwoSizeMapper

__all__ = [
    "TwoSizeMapper",
    "check_dataset",
    "check_datasets",
    "check_same_classes",
    "prepare_digits",
    "register_datasets",
    "register_digit_maps",
    "register_digits",
]

register_digits()
register_digit_maps()
