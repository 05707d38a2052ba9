"""Processes that tests start. None outlives the block that started it, whatever becomes of the test."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MARK = "KD_TEST_PROCESS"  # a variable that a started process hands down to all that it starts


@contextmanager
def started(
    command: Sequence[object], env: Mapping[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen]:
    """`subprocess.Popen` in a session of its own; at the end of the block the process and everything that it has
    started are killed.

    The session's group is not enough: tools/demo.py starts its trainings in sessions of their own. So descendants are
    found by a variable of their environment, where the system has /proc.
    """
    mark = {MARK: uuid.uuid4().hex}
    variables = (os.environ if env is None else env) | mark
    with subprocess.Popen([*map(str, command)], env=variables, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            end(process.pid, mark[MARK])


def end(session: int, mark: str) -> None:
    """Kill the processes of a session, the descendants of its first, and those with the mark in their environment."""
    for number in descendants(session):
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
    while left := marked(f"{MARK}={mark}"):  # again, for those that were being started
        for number in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        time.sleep(0.005)


def descendants(process: int) -> list[int]:
    """What a living process and its children have started, as far as those live."""
    children: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            children += map(int, path.read_text().split())
    return children + [number for child in children for number in descendants(child)]


def marked(mark: str) -> list[int]:
    """The living processes with a variable in their environment; one that is dead but not yet waited for has none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # ended meanwhile, or another user's
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def run(command: Sequence[object], timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text, but nothing that it has started is left, also after a timeout."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, **pipes | options) as process:
        output, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
