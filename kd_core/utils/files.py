"""Files that are written whole or not at all, and why one cannot be read."""

import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

# `.<name>.<machine>.<process>.tmp`: whoever finds it can tell whether its writer still lives
UNFINISHED = re.compile(r"\..+\.(?P<machine>[^.]+)\.(?P<process>\d+)\.tmp")
ABANDONED_SECONDS = 24 * 3600  # no writer takes a day; one on another machine of a shared disk cannot be asked


def write_whole(path: str | os.PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` on a temporary file beside `path`, and move it there once it is complete and on disk.

    A failure leaves what was at `path`, and nothing beside it; a kill leaves a file for `sweep_unfinished`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{this_machine()}.{os.getpid()}.tmp")
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


def sweep_unfinished(folder: str | os.PathLike) -> list[Path]:
    """Remove what writers that were killed have left in `folder`; files that are being written stay.

    Returns:
        The files that were removed.
    """
    swept = []
    for path in sorted(Path(folder).glob(".*.tmp")):
        match = UNFINISHED.fullmatch(path.name)
        if match and is_abandoned(path, match["machine"], int(match["process"])):
            path.unlink(missing_ok=True)
            swept.append(path)
    return swept


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


def is_abandoned(path: Path, machine: str, process: int) -> bool:
    """Whether the process that began `path` is gone."""
    if machine == this_machine():
        return not is_running(process)
    try:
        return time.time() - path.stat().st_mtime > ABANDONED_SECONDS
    except FileNotFoundError:  # finished meanwhile
        return False


def is_running(process: int) -> bool:
    """Whether a process of this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def this_machine() -> str:
    """The host's name, without the dots that part a file's name."""
    return socket.gethostname().replace(".", "-") or "localhost"
