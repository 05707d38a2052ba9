"""The demo can be interrupted at any time, ends its training then, and says how to resume."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from helpers import forked
from helpers.processes import started

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"
IGNORING = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"


@contextmanager
def forked_demo(output: Path) -> Iterator[tuple[BaseProcess, int]]:
    """The demo, whose errors are in said.err beside `output`, and the number of its first training's process."""
    with forked.started_command([DEMO, "--output", output], output.with_name("said")) as demo:
        while not (children := children_of(demo.pid)):
            assert demo.exitcode is None
            time.sleep(0.005)
        assert "teacher: training into" in output.with_name("said.out").read_text()
        yield demo, children[0]


@contextmanager
def started_demo(output: Path, *wrapper: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """The same in processes that import everything themselves."""
    command = [*wrapper, sys.executable, str(DEMO), "--output", str(output)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with started(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as demo:
        assert "teacher: training into" in demo.stdout.readline()
        while not (children := children_of(demo.pid)):
            time.sleep(0.005)
        yield demo, children[0]


def children_of(process: int) -> list[int]:
    """Living processes that any thread of `process` has started."""
    paths = Path(f"/proc/{process}/task").glob("*/children")
    return [int(word) for path in paths for word in path.read_text().split()]


def wait_for_the_end(process: int) -> None:
    deadline = time.monotonic() + 20
    while Path(f"/proc/{process}").exists():
        assert time.monotonic() < deadline, "the training still runs"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=["Ctrl-C", "kill", "hang-up"])
def test_an_interrupted_demo_ends_its_training_and_says_what_to_run_to_resume(tmp_path, number):
    with forked_demo(tmp_path / "demo") as (demo, training):
        os.killpg(demo.pid, number)  # as a terminal does
        demo.join(60)
        wait_for_the_end(training)
    errors = (tmp_path / "said.err").read_text()
    assert demo.exitcode == 1 and "Traceback" not in errors
    command = f"{sys.executable} {DEMO} --output {tmp_path / 'demo'}"
    assert errors.splitlines()[-1] == f"[demo] interrupted; to resume: {command}"


def test_a_demo_in_the_background_ignores_an_interrupt_and_its_training_does_not(tmp_path):
    with started_demo(tmp_path / "demo", sys.executable, "-c", IGNORING) as (demo, training):
        os.kill(demo.pid, signal.SIGINT)
        os.kill(training, signal.SIGINT)
        _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1 and "[demo] a training failed (exit" in errors.splitlines()[-1]


def test_a_training_that_is_being_started_when_the_block_ends_is_ended_too(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import demo

    processes = []

    class SlowlyStarted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)
            time.sleep(0.5)

    monkeypatch.setattr(subprocess, "Popen", SlowlyStarted)
    with pytest.raises(KeyboardInterrupt), demo.Trainings() as trainings:
        training = trainings.train("teacher", tmp_path / "output")
        while not processes:
            time.sleep(0.005)
        raise KeyboardInterrupt
    assert processes[0].returncode == -signal.SIGKILL
    with pytest.raises(subprocess.CalledProcessError):
        training.result()
