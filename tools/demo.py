#!/usr/bin/env python
"""Distil a detector from nothing: built-in data, a teacher, a plain student and a DKD student, one table, one picture
and one report.

    tools/demo.py                     # one seed: about 20 minutes on two CPU cores
    tools/demo.py --seeds 0 1 2       # the students of several seeds (one teacher): mean ± standard deviation

It can be interrupted at any time: the same command resumes the training that was interrupted and skips those that are
finished.
"""

import argparse
import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from pathlib import Path

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text
from kd_core.utils.latency import clock

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "Digits"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each ends the demo as Ctrl-C does
TITLES = {"baseline": "plain", "kd": "KD", "dkd": "DKD"}  # as the papers' tables call them


class Trainings:
    """Processes that train, `jobs` at a time. Leaving the block ends those that still run.

    Threads start the processes and wait for them. Python handles signals in the main thread alone, so no interrupt can
    strike inside `Popen`, where the process that was just started would be lost.
    """

    def __init__(self, jobs: int = 1, environment: Mapping[str, str] | None = None) -> None:
        self.pool = ThreadPoolExecutor(jobs)
        self.variables = os.environ | {"PYTHONWARNINGS": "ignore"} | dict(environment or {})
        self.running: set[subprocess.Popen] = set()
        self.lock, self.ended = threading.Lock(), False

    def __enter__(self) -> "Trainings":
        return self

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.ended = True
            for process in self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with its data loader's workers
        self.pool.shutdown(cancel_futures=True)

    def train(self, name: str, output_dir: Path, *options: str) -> Future:
        """Train `configs/Digits/<name>.yaml` into `output_dir`, from its last checkpoint if there is one, unless it is
        finished. A failed training is a CalledProcessError of the result.
        """
        return self.pool.submit(self._train, name, output_dir, options)

    def _train(self, name: str, output_dir: Path, options: tuple[str, ...]) -> None:
        finished, settings = output_dir / "finished", fingerprint(options)
        if finished.is_file():
            if finished.read_text(encoding="utf-8") != settings:
                sys.exit(f"[demo] {output_dir} was finished with other settings: remove it, or choose another --output")
            print(f"[demo] {name}: finished before, in {output_dir}")
            return
        print(f"[demo] {name}: training into {output_dir}", flush=True)
        command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(CONFIGS / f"{name}.yaml")]
        self.run([*command, "--resume", "OUTPUT_DIR", str(output_dir), *options])
        write_text(finished, settings)

    def run(self, command: list[str]) -> None:
        """`subprocess.run(check=True)` in a session of its own, so that Ctrl-C reaches this process alone."""
        with self.lock:
            if self.ended:
                raise CancelledError
            process = subprocess.Popen(command, cwd=ROOT, env=self.variables, start_new_session=True)
            self.running.add(process)
        code = process.wait()
        with self.lock:  # from now on its number may be another process's
            self.running.remove(process)
        if code:
            raise subprocess.CalledProcessError(code, command)


def wait_for(training: Future) -> None:
    """`training.result()`, which a signal interrupts whichever thread the system gives it to.

    A main thread that waits without a limit is not woken by a signal that another thread receives.
    """
    while not training.done():
        wait([training], timeout=0.2)
    training.result()


def listen() -> None:
    """Let every signal of `SIGNALS` raise a KeyboardInterrupt, unless it is ignored (nohup, a job in the background).

    An ignored one gets a handler that does nothing: the trainings would inherit SIG_IGN, a handler they do not.
    """
    for number in SIGNALS:
        ignored = signal.getsignal(number) == signal.SIG_IGN
        signal.signal(number, (lambda *_: None) if ignored else interrupt)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


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
    with Trainings() as trainings:
        wait_for(trainings.train("teacher", teacher, "SEED", str(args.seeds[0]), *args.options))
        for seed in args.seeds:
            for student in args.students:
                words = [] if student == "baseline" else ["KD.TEACHER.WEIGHTS", str(teacher / "model_final.pth")]
                folder = output / f"{student}_seed{seed}"
                wait_for(trainings.train(student, folder, "SEED", str(seed), *words, *args.options))

    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    # detectron2 takes seconds to import: only when there is something to report
    from report import write_report

    from kd_det.evaluation import report
    from kd_det.evaluation.visualize import draw_comparison

    runs = {"teacher": [report.read_run(teacher)]}
    for student in args.students:
        runs[TITLES.get(student, student)] = [report.read_run(output / f"{student}_seed{seed}") for seed in args.seeds]
    write_text(output / "table.md", report.table(runs) + "\n")
    first = args.seeds[0]
    columns = {"teacher": teacher} | {TITLES.get(name, name): output / f"{name}_seed{first}" for name in args.students}
    draw_comparison(columns, "digits_val", output / "detections.png")
    students = [output / f"{name}_seed{seed}" for name in args.students for seed in args.seeds]
    write_report([teacher, *students], output / "report.html", "The demo: teacher, plain student, distilled students")
    print(
        f"\n{report.table(runs)}\n\nSeeds {args.seeds}; {clock(time.time() - start)} in all this time. "
        f"Table: {output / 'table.md'}, picture: {output / 'detections.png'}, all of it: {output / 'report.html'}"
    )


def run_command(name: str, main: Callable[[], object], interrupted: str) -> None:
    """`main()` of a tool that runs trainings; what stops it ends it in one line that says how to resume."""
    listen()
    try:
        main()
    except UserError as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n[{name}] {interrupted}")
    except subprocess.CalledProcessError as error:
        sys.exit(
            f"[{name}] a training failed (exit {error.returncode}); its message is above. "
            "The same command resumes from its last checkpoint."
        )


if __name__ == "__main__":
    run_command("demo", main, f"interrupted; to resume: {shlex.join([sys.executable, *sys.argv])}")
