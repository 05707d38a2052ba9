#!/usr/bin/env python
"""Distil a detector from nothing: built-in data, a teacher, a plain student and a DKD student, one table and one
picture.

    tools/demo.py                     # one seed: about a quarter of an hour on two CPU cores
    tools/demo.py --seeds 0 1 2       # the students of several seeds (one teacher): mean ± standard deviation

Interrupt it when you like: run again, it goes on where it was, and what is finished is not repeated.
"""

import argparse
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "Digits"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends the demo as Ctrl-C does
TITLES = {"baseline": "plain", "kd": "KD", "dkd": "DKD"}  # as the papers' tables call them


def train(
    name: str,
    output_dir: Path,
    *options: str,
    environment: Mapping[str, str] | None = None,
    own_session: bool = True,
) -> None:
    """Train `configs/Digits/<name>.yaml` into `output_dir`, from its last checkpoint if there is one, unless it is
    finished.

    In a session of its own Ctrl-C reaches this process alone, which then ends the training: it may be at its imports.
    """
    finished, settings = output_dir / "finished", fingerprint(options)
    if finished.is_file():
        if finished.read_text(encoding="utf-8") != settings:
            sys.exit(f"[demo] {output_dir} was finished with other settings: remove it, or choose another --output")
        print(f"[demo] {name}: finished before, in {output_dir}")
        return
    print(f"[demo] {name}: training into {output_dir}", flush=True)
    command = [
        sys.executable,
        str(ROOT / "tools" / "train_net.py"),
        "--config-file",
        str(CONFIGS / f"{name}.yaml"),
        "--resume",
        "OUTPUT_DIR",
        str(output_dir),
        *options,
    ]
    quiet = {"PYTHONWARNINGS": "ignore"}  # progress, not deprecations
    variables = os.environ | quiet | dict(environment or {})
    if own_session:
        run_in_own_session(command, variables)
    else:
        subprocess.run(command, cwd=ROOT, check=True, env=variables)
    finished.write_text(settings, encoding="utf-8")


def run_in_own_session(command: list[str], variables: Mapping[str, str]) -> None:
    """`subprocess.run(check=True)`, but an interruption ends the process also when it comes while that is started."""
    process = None
    try:
        with postponed_signals():  # in Popen one would lose the process that is just begun
            process = subprocess.Popen(command, cwd=ROOT, env=variables, start_new_session=True)
        if code := process.wait():
            raise subprocess.CalledProcessError(code, command)
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


@contextmanager
def postponed_signals() -> Iterator[None]:
    """What would interrupt the block is raised at its end, as a KeyboardInterrupt."""
    came: list[int] = []
    handlers = listen(lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt


def listen(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Call `handler` at every signal of `SIGNALS`, but one that is ignored (nohup); returns the handlers until now."""
    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def fingerprint(options: tuple[str, ...]) -> str:
    """What a training depends on: the overrides and the detectors' configs."""
    configs = b"".join(path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml")) if "cls" not in path.name)
    return hashlib.sha256(repr(options).encode() + configs).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of the students (the teacher's is the first)"
    )
    parser.add_argument("--students", nargs="+", default=["baseline", "dkd"], help="configs of configs/Digits")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="where everything is written")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="KEY VALUE overrides for every training")
    args = parser.parse_args()
    output, start = args.output.resolve(), time.time()

    teacher = output / f"teacher_seed{args.seeds[0]}"
    train("teacher", teacher, "SEED", str(args.seeds[0]), *args.options)
    for seed in args.seeds:
        for student in args.students:
            weights = [] if student == "baseline" else ["KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
            train(student, output / f"{student}_seed{seed}", "SEED", str(seed), *weights, *args.options)

    warnings.simplefilter("ignore")
    from kd_det import report  # detectron2 takes seconds to import: only when there is something to report

    runs = {"teacher": [report.read_run(teacher)]}
    for student in args.students:
        runs[TITLES.get(student, student)] = [report.read_run(output / f"{student}_seed{seed}") for seed in args.seeds]
    (output / "table.md").write_text(report.table(runs) + "\n", encoding="utf-8")
    first = args.seeds[0]
    columns = {"teacher": teacher} | {TITLES.get(name, name): output / f"{name}_seed{first}" for name in args.students}
    report.draw_detections(columns, "digits_val", output / "detections.png")
    print(
        f"\n{report.table(runs)}\n\nSeeds {args.seeds}; {report.clock(time.time() - start)} in all this time. "
        f"Table: {output / 'table.md'}, picture: {output / 'detections.png'}"
    )


def interrupt(*_: object) -> None:
    """A signal handler: a terminal that is closed, or a `kill`, ends the training as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    listen(interrupt)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(f"\n[demo] interrupted; to go on: {shlex.join([sys.executable, *sys.argv])}")
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"[demo] a training failed (exit {error.returncode}); its message stands above. "
            "The same command goes on from its last checkpoint."
        )
