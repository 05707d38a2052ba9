"""Tests leave no process behind, and hold where the shell that started them ignores signals (nohup, a job in the
background).
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT
from helpers.processes import run, started

SLEEPER = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True); "
IGNORING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"


def lives(number: int) -> bool:
    """Whether a process is there and not merely waiting to be waited for."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end", ["pass", "input()"], ids=["its parent has ended", "its parent lives"])
def test_a_failed_test_leaves_no_process_not_even_one_in_a_session_of_its_own(end: str) -> None:
    command = [sys.executable, "-c", SLEEPER + end]
    with pytest.raises(ZeroDivisionError), started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        child = int(process.stdout.readline())
        assert lives(child)
        raise ZeroDivisionError
    assert process.returncode is not None and not lives(child)


def test_a_process_is_ended_by_an_interrupt() -> None:
    with started(["sleep", "60"]) as process:
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_the_same_where_the_shell_ignores_interrupts() -> None:
    tests = f"{__file__}::{test_a_process_is_ended_by_an_interrupt.__name__}"
    python = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", "--rootdir", str(ROOT), tests]
    done = run([sys.executable, "-c", IGNORING, *python], cwd=ROOT)
    assert done.returncode == 0, done.stdout
