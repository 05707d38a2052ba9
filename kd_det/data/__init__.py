"""Data sets of kd_det: the built-in digits, registered on import, and the user's own (`DATASETS.REGISTER`)."""

from .builtin import prepare_digits, register_digits

__all__ = ["prepare_digits", "register_digits"]

register_digits()
