"""How a command ends: one line for what the user can fix, a traceback for a bug."""

import pytest

from kd_core.utils.errors import DIVERGED, DivergedError, UserError, exit_on_user_error


def raising(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("KD.X is 3: set it to 4"), "tool: KD.X is 3: set it to 4"),
        (FileNotFoundError(2, "No such file or directory", "a.yaml"), "tool: a.yaml: No such file or directory"),
        (KeyboardInterrupt(), "\ntool: interrupted"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(error, line):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error("tool", raising(error))
    assert ended.value.code == line


def test_a_training_that_diverged_has_a_status_of_its_own(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error("tool", raising(DivergedError("nckd is nan")))
    assert ended.value.code == DIVERGED and capsys.readouterr().err == "tool: nckd is nan\n"


@pytest.mark.parametrize("error", [ValueError("zip() argument 2 is shorter"), OSError("no name"), RuntimeError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as raised:
        exit_on_user_error("tool", raising(error))
    assert raised.value is error


def test_a_command_returns_what_its_main_returns():
    assert exit_on_user_error("tool", lambda: 3) == 3
