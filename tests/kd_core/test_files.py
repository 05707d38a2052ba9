"""Files are whole or absent, and what a killed writer leaves is swept away."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd_core.files import ABANDONED_SECONDS, sweep_unfinished, this_machine, write_text, write_whole

WRITE_SLOWLY = """
import sys, time
from kd_core.files import write_whole
write_whole(sys.argv[1], lambda file: (file.write(b"half"), file.flush(), print("begun", flush=True), time.sleep(60)))
"""


@pytest.fixture
def writer(tmp_path: Path):
    """A process in the middle of writing `tmp_path`/model.pth."""
    command = [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "model.pth")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()


def test_a_text_is_there_in_full(tmp_path: Path):
    write_text(tmp_path / "a.txt", "±\n")
    assert (tmp_path / "a.txt").read_bytes() == "±\n".encode()
    assert list(tmp_path.iterdir()) == [tmp_path / "a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path):
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        write_whole(path, lambda file: (file.write(b"half"), 1 / 0))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_being_written_is_not_swept(writer: subprocess.Popen, tmp_path: Path):
    (unfinished,) = tmp_path.iterdir()
    assert sweep_unfinished(tmp_path) == [] and unfinished.read_bytes() == b"half"


def test_what_a_killed_writer_left_is_swept(writer: subprocess.Popen, tmp_path: Path):
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (unfinished,) = tmp_path.iterdir()
    (tmp_path / ".mine.tmp").touch()  # not by this hand
    assert sweep_unfinished(tmp_path) == [unfinished]
    assert list(tmp_path.iterdir()) == [tmp_path / ".mine.tmp"]


def test_a_writer_on_another_machine_has_a_day(tmp_path: Path):
    unfinished = tmp_path / f".model.pth.not-{this_machine()}.1.tmp"
    unfinished.touch()
    assert sweep_unfinished(tmp_path) == []
    old = time.time() - ABANDONED_SECONDS - 60
    os.utime(unfinished, (old, old))
    assert sweep_unfinished(tmp_path) == [unfinished]


def test_a_folder_that_is_not_there_holds_nothing_to_sweep(tmp_path: Path):
    assert sweep_unfinished(tmp_path / "none") == []
