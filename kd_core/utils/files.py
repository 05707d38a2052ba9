"""Files that are written whole or not at all, metrics.json cut for a resume, and why a file cannot be read."""

import json
import os
import re
import socket
from collections.abc import Callable
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any, BinaryIO

UNFINISHED = ".*.[0-9]*.tmp"  # .<name>.<machine>.<process>.tmp


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` on a temporary file beside `path`, and move it there once it is complete and on disk.

    A failure leaves what was at `path`, and nothing beside it; a kill leaves a file for `sweep_unfinished`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname().replace('.', '-')}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def sweep_unfinished(folder: str | os.PathLike) -> None:
    """Remove the unfinished files that killed writers left in the folder of a training, which starts now."""
    for path in Path(folder).glob(UNFINISHED):
        path.unlink(missing_ok=True)


def set_aside(path: str | os.PathLike) -> Path | None:
    """Rename a file of an earlier training, `best.pth` to `best_earlier.pth`, so that it is not taken for this one's.

    Where that exists, too, it becomes `best_earlier2.pth` and so on: nothing is replaced.

    Returns:
        The new name; None where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        return None
    names = (path.with_stem(f"{path.stem}_earlier{number}") for number in chain([""], count(2)))
    return path.replace(next(name for name in names if not name.exists()))


def cut_metrics(path: str | os.PathLike, last: int) -> None:
    """Cut a metrics.json after iteration `last`: after a kill, a resumed run writes the later lines again.

    The file is truncated in place: detectron2's writer has it open already, for appending.
    """
    if Path(path).is_file():
        kept = takewhile(lambda line: is_within(line, last), Path(path).read_bytes().splitlines(keepends=True))
        os.truncate(path, sum(map(len, kept)))


def is_within(line: bytes, last: int) -> bool:
    """Whether a line of metrics.json is whole and is of iteration `last` or an earlier one."""
    try:
        return line.endswith(b"\n") and json.loads(line)["iteration"] <= last
    except (ValueError, KeyError, TypeError):
        return False


def unreadable_because(error: Exception) -> str:
    """What made `torch.load(…, weights_only=True)` or a restricted unpickler fail, in a few words.

    torch's own message advises to turn the restriction off, which is never the way to load weights.
    """
    text = str(error)
    if match := re.search(r"GLOBAL (\S+)", text):
        return f"it refers to {match[1]}, which weights do not need"
    if "weights_only" in text:
        return "its bytes are not what torch.save writes"
    return next(iter(text.splitlines()), "") or type(error).__name__
