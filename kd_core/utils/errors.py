"""Errors that the user can fix, and how a command ends on one."""

import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")
DIVERGED = 3  # exit status


class UserError(ValueError):
    """The user's input is wrong; the message names the key or the file, its value and the fix.

    A command prints it as one line (`exit_on_user_error`). Every other error is a bug, ours or a library's, and keeps
    its traceback.
    """


class DivergedError(UserError, FloatingPointError):
    """A loss or a gradient is not finite; the message names the iteration, the learning rate and what to lower."""


def one_line(error: BaseException, length: int = 300) -> str:
    """The start of an exception's message, in one line; its class where it has none."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def exit_on_user_error(name: str, main: Callable[[], Result], interrupted: str = "interrupted") -> Result:
    """`main()`; what the user can fix ends the process with one line on stderr and status 1.

    That is a `UserError`, an OSError that names a file, and Ctrl-C. A `DivergedError` has the status `DIVERGED`: the
    same training would diverge again. Works in any process of a training.

    Args:
        name: of the command, which opens the line.
        main: what the command does.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return main()
    except DivergedError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(DIVERGED)
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except OSError as error:
        if error.filename is None:
            raise
        sys.exit(f"{name}: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: {interrupted}")
