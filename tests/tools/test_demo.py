"""The demo can be interrupted at any time, and says how to go on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DEMO = Path(__file__).resolve().parents[2] / "tools" / "demo.py"


def children(process: int) -> list[int]:
    """Processes that `process` has started and that live."""
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def lives(process: int) -> bool:
    """Whether a process is there and no zombie, which waits for its parent only."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_while_a_training_is_started_ends_it_as_soon_as_it_is(monkeypatch, number):
    monkeypatch.syspath_prepend(str(DEMO.parent))
    import demo

    processes = []

    class SignalledWithin(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            processes.append(self)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(subprocess, "Popen", SignalledWithin)
    handlers = [signal.getsignal(number) for number in demo.SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        demo.run_in_own_session([sys.executable, "-c", "import time; time.sleep(60)"], os.environ)
    assert processes[0].returncode == -signal.SIGKILL
    assert [signal.getsignal(number) for number in demo.SIGNALS] == handlers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_an_interrupted_demo_ends_its_training_and_says_what_to_run_to_go_on(tmp_path, number):
    command = [sys.executable, str(DEMO), "--output", str(tmp_path / "demo")]
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    assert "teacher: training into" in demo.stdout.readline()
    while not (started := children(demo.pid)):
        time.sleep(0.01)
    os.killpg(demo.pid, number)  # as a terminal does
    _, errors = demo.communicate(timeout=60)
    assert demo.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == f"[demo] interrupted; to go on: {' '.join(command)}"
    deadline = time.time() + 20
    while any(map(lives, started)):
        assert time.time() < deadline, "the training goes on"
        time.sleep(0.05)
