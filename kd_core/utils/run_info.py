"""run.json: the command, the versions, the commit and the machine of a training, written when it starts."""

import json
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from kd_core.utils.files import write_text

FILE = "run.json"
EVALUATION = "evaluation.json"  # the same of an evaluation, with its results
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "detectron2", "timm", "fvcore", "numpy", "pycocotools")


def write_run_info(output_dir: str | Path, start_iter: int, file: str = FILE, **facts: Any) -> None:
    """Write `output_dir`/run.json at the start of a training, or evaluation.json.

    Args:
        start_iter: above 0 the training is resumed: its command joins the earlier ones under `resumed`.
        facts: more entries: seed, device, world size, parameters.
    """
    now = {"command": command_line(), "started": datetime.now(UTC).isoformat(timespec="seconds"), **source()}
    earlier = read_run_info(output_dir) if start_iter > 0 else {}
    if earlier:
        earlier.setdefault("resumed", []).append({"iteration": start_iter, **now})
        info = earlier
    else:
        info = {**now, "versions": versions(), "machine": machine(), **facts}
    write_text(Path(output_dir, file), json.dumps(info, indent=1) + "\n")


def add_run_info(output_dir: str | Path, **facts: Any) -> None:
    """Add or replace entries of `output_dir`/run.json."""
    write_text(Path(output_dir, FILE), json.dumps({**read_run_info(output_dir), **facts}, indent=1) + "\n")


def read_run_info(output_dir: str | Path, file: str = FILE) -> dict[str, Any]:
    """What `write_run_info` wrote; {} where there is no such file, or a broken one."""
    try:
        info = json.loads(Path(output_dir, file).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def command_line() -> str:
    """The words that started this process, or the one that started it as one of several."""
    spawned = "--multiprocessing-fork" in sys.orig_argv  # by multiprocessing, which hands sys.argv down
    return shlex.join(["python", *(sys.argv if spawned or len(sys.orig_argv) < 2 else sys.orig_argv[1:])])


def versions() -> dict[str, str]:
    """Python's version and those of the packages that decide about results; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """GPUs, or operating system and processor."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    return f"{platform.system()}, {processor()}, no GPU"


def processor() -> str:
    """The processor's name, if the system reports it, and the widest vector instructions that torch uses."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def source() -> dict[str, Any]:
    """Commit of this code, and whether its files differ from it; {} outside a git checkout."""
    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "modified": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return {}


def git(*words: str) -> str:
    if not (ROOT / ".git").exists():  # an installed copy may lie inside another repository
        raise FileNotFoundError(ROOT / ".git")
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
