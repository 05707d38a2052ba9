"""Numbers on a command line."""

import argparse

from kd_core.utils.errors import UserError


def count(word: str) -> int:
    """argparse's `type=` of a whole number from 1."""
    if not word.isdigit() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word}: expected a whole number from 1")
    return int(word)


def refuse_not_positive(args: argparse.Namespace, *options: str) -> None:
    """Raise a UserError for an option that is given and not above 0."""
    for option in options:
        value = getattr(args, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option.replace('_', '-')} is {value}, expected a number above 0")
