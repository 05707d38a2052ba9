"""Tests leave no process behind, and hold where the shell that started them ignores signals (nohup, a job in the
background).
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import ROOT, forked
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


def test_a_failed_test_leaves_no_fork_and_nothing_that_one_has_started(tmp_path: Path) -> None:
    script = tmp_path / "sleeper.py"
    script.write_text(SLEEPER + "import time; time.sleep(60)")
    with pytest.raises(ZeroDivisionError), forked.started_command([script], tmp_path / "said") as process:
        while not (tmp_path / "said.out").is_file() or not (said := (tmp_path / "said.out").read_text()).endswith("\n"):
            time.sleep(0.01)
        assert lives(int(said)) and lives(process.pid)
        raise ZeroDivisionError
    assert process.exitcode == -signal.SIGKILL and not lives(int(said))


def test_a_fork_is_the_command_with_its_words_variables_folder_and_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['WORD'], os.getcwd(), __name__); sys.exit('bad')")
    done = forked.run([script, 1, "two"], env=os.environ | {"WORD": "three"}, cwd=tmp_path)
    assert done.stdout.split("\n")[0] == f"['1', 'two'] three {tmp_path} __main__"
    assert (done.returncode, done.stderr) == (1, "bad\n")


def be_interrupted_at_the_fork(script: str, said: str) -> None:
    """A command whose SIGINT came between the fork and its first line."""
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    signal.pthread_sigmask(signal.SIG_BLOCK, forked.SIGNALS)
    os.kill(os.getpid(), signal.SIGINT)
    forked.go_on_as([script], {})


def test_a_fork_that_is_interrupted_before_its_first_line_ends_by_the_signal_as_python_does(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with forked.started(be_interrupted_at_the_fork, str(script), str(tmp_path / "said")) as process:
        process.join(60)
    assert process.exitcode == -signal.SIGINT and not (tmp_path / "ran").exists()
    assert (tmp_path / "said").read_text() == ""  # Python has not started: no traceback


def test_a_process_is_ended_by_an_interrupt() -> None:
    with started(["sleep", "60"]) as process:
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_the_same_where_the_shell_ignores_interrupts() -> None:
    tests = f"{__file__}::{test_a_process_is_ended_by_an_interrupt.__name__}"
    python = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n0", "--rootdir", str(ROOT), tests]
    done = run([sys.executable, "-c", IGNORING, *python], cwd=ROOT)
    assert done.returncode == 0, done.stdout
