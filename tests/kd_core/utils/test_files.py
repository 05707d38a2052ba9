"""Files are whole or absent, and what a killed writer leaves is swept away."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.processes import started
from kd_core.utils.files import cut_metrics, sweep_unfinished, unreadable_because, write_text, write_whole

WRITE_SLOWLY = """
import sys, time
from kd_core.utils.files import write_whole
write_whole(sys.argv[1], lambda file: (file.write(b"half"), file.flush(), print("begun", flush=True), time.sleep(60)))
"""


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


def test_what_killed_writers_left_is_swept_and_no_other_file(tmp_path: Path):
    command = [sys.executable, "-c", WRITE_SLOWLY, str(tmp_path / "model.pth")]
    with started(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "begun\n"
        writer.kill()
        writer.wait()
    (unfinished,) = tmp_path.iterdir()
    assert unfinished.read_bytes() == b"half"
    of_an_older_version, foreign = tmp_path / ".model.pth.123.tmp", tmp_path / ".mine.tmp"
    of_an_older_version.touch()
    foreign.touch()
    sweep_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_folder_that_is_not_there_holds_nothing_to_sweep(tmp_path: Path):
    sweep_unfinished(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_lines_after_the_iteration_and_half_a_line_are_cut_from_metrics(tmp_path: Path):
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "loss": float(i)}) + "\n" for i in (2, 4, 4, 6)]
    path.write_text("".join(lines) + '{"iteration": 8, "lo')
    cut_metrics(path, last=6)
    assert path.read_text() == "".join(lines)
    with open(path, "a") as already_open:  # as detectron2's writer has it
        cut_metrics(path, last=4)
        already_open.write(lines[3])
    assert path.read_text() == "".join(lines)
    cut_metrics(tmp_path / "none.json", last=4)
    assert not (tmp_path / "none.json").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_executed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (Evil(), f"it refers to {os.system.__module__}.system, which weights do not need"),
        (Path("a"), "it refers to pathlib.PosixPath, which weights do not need"),
        (b"<!DOCTYPE html><html>not found</html>", "its bytes are not what torch.save writes"),
        (b"", "EOFError"),
    ],
    ids=["code", "object", "html", "empty"],
)
def test_the_reason_why_a_file_is_no_checkpoint_never_advises_to_trust_it(tmp_path, monkeypatch, content, reason):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("model.pth").write_bytes(content)
    else:
        torch.save({"model": content}, "model.pth")
    with pytest.raises(Exception) as raised:
        torch.load("model.pth", weights_only=True)
    assert unreadable_because(raised.value).startswith(reason)
    assert not Path("was_executed").exists()
