"""Kill -9 at random points of a training, then --resume: it must end to the bit where an undisturbed one does.

python tests/helpers/kill_and_resume.py --times 10

kills as many trainings in the middle of an iteration, at a random time, and as many in the middle of a write, at a
random byte or at a file's edge (the file complete, but not yet in its place). A training is tools/train_net.py's `main`
on the built-in digits, with a tiny detector: DeepKD, automatic momenta, a moving average, and a checkpoint every second
of six iterations. `--others` kills a training of every other meta-architecture, too, in the third of four iterations,
in bfloat16 and with micro-batches. Processes are forked, so that detectron2 is imported once.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kd_core.utils import files
from kd_det.engine.launch import argument_parser
from kd_det.engine.trainer import DistillationTrainer

FORK = multiprocessing.get_context("fork")
ROOT = Path(__file__).resolve().parents[2]
TRAINING = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.EMA.ENABLED", True,
    "SOLVER.BASE_LR", 0.005, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip
LONG = (
    "KD.LOSS.WARMUP_ITERS", 4, "SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 2, "SOLVER.GSNR.WINDOW", 4,
    "SOLVER.MAX_ITER", 6, "SOLVER.STEPS", "(5,)",
)  # fmt: skip
SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)")
Killer = Callable[[], None]  # called in the process that is to die, before it trains


class CountedFile:
    """A file that tells how many bytes it is about to take."""

    def __init__(self, file: BinaryIO, written: Callable[[BinaryIO, bytes], None]) -> None:
        self.file, self.written = file, written

    def write(self, data: bytes) -> int:
        self.written(self.file, bytes(data))
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "CountedFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def count_writes(written: Callable[[BinaryIO, bytes], None]) -> None:
    """Let `written` do the writing of every file that is written whole."""

    def counted(path: Path, mode: str) -> CountedFile:
        return CountedFile(open(path, mode), written)

    files.open = counted  # shadows the builtin in that module


def log_sizes(path: Path) -> None:
    """Add the size of every write to a file, a line each; an empty line where a file begins."""

    def written(file: BinaryIO, data: bytes) -> None:
        with open(path, "a") as log:
            log.write(("\n" if file.tell() == 0 else "") + f"{len(data)}\n")
        file.write(data)

    count_writes(written)


def die_at_byte(position: int) -> None:
    """Die when this many bytes have been written, all files together."""
    total = 0

    def written(file: BinaryIO, data: bytes) -> None:
        nonlocal total
        total += len(data)
        if total >= position:
            file.write(data[: len(data) - (total - position)])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(data)

    count_writes(written)


def die_in_third_iteration() -> None:
    """Die when the weights of the third iteration have been updated, and nothing has been written of it."""

    def fatal(trainer: DistillationTrainer) -> None:
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        after_step(trainer)

    after_step, DistillationTrainer.after_step = DistillationTrainer.after_step, fatal


def train(config: Path, output: Path, begun: Any, killer: Killer) -> None:
    """tools/train_net.py --resume, in a process of its own whose output goes to a file; `begun` hears of the start."""
    output.mkdir(exist_ok=True)
    log = os.open(output / "stdout.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    spec = importlib.util.spec_from_file_location("train_net", ROOT / "tools" / "train_net.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    run_step = DistillationTrainer.run_step

    def first_step(trainer: DistillationTrainer) -> None:
        DistillationTrainer.run_step = run_step
        begun.send(None)
        run_step(trainer)

    DistillationTrainer.run_step = first_step
    killer()
    options = ["--config-file", str(config), "--num-gpus", "0", "--resume", "OUTPUT_DIR", str(output)]
    tool.main(argument_parser("").parse_args(options))


def start(config: Path, output: Path, killer: Killer = lambda: None) -> tuple[BaseProcess, Any]:
    """A training's process, and what hears when its first iteration begins."""
    hears, tells = FORK.Pipe(duplex=False)
    process = FORK.Process(target=train, args=(config, output, tells, killer))
    process.start()
    tells.close()
    return process, hears


def finish(config: Path, output: Path, killer: Killer = lambda: None) -> float:
    """Train to the end; returns the seconds from the first iteration on."""
    process, begun = start(config, output, killer)
    with contextlib.suppress(EOFError):  # no iteration was left to train; or an error, which the exit code tells
        begun.recv()
    began = time.monotonic()
    process.join()
    if process.exitcode:
        raise SystemExit(f"the training in {output} failed:\n" + (output / "stdout.txt").read_text()[-3000:])
    return time.monotonic() - began


def kill_in_an_iteration(config: Path, output: Path, seconds: float, draw: random.Random) -> bool:
    """Kill at a random time after the start of the first iteration; False where the training was faster."""
    process, begun = start(config, output)
    begun.recv()
    time.sleep(draw.uniform(0, seconds))
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL and not (output / "model_final.pth").exists()


def kill_in_third_iteration(config: Path, output: Path) -> bool:
    """Kill in the middle of the third iteration."""
    process, _ = start(config, output, die_in_third_iteration)
    process.join()
    return process.exitcode == -signal.SIGKILL


def kill_in_a_write(config: Path, output: Path, sizes: list[list[int]], draw: random.Random) -> bool:
    """Kill at a random byte of all that is written, every other time at the first or last byte of a file."""
    position = draw.randrange(sum(map(sum, sizes)))
    if draw.random() < 0.5:
        before = draw.randrange(len(sizes))
        position = sum(map(sum, sizes[:before])) + draw.choice([1, sum(sizes[before])])
    process, _ = start(config, output, lambda: die_at_byte(position))
    process.join()
    return process.exitcode == -signal.SIGKILL


def check_whole(output: Path) -> int:
    """The iterations in the checkpoint that --resume will follow, which must be whole; 0 where there is none."""
    if not (output / "last_checkpoint").exists():
        return 0
    path = output / (output / "last_checkpoint").read_text()
    return torch.load(path, weights_only=True)["trainer"]["iteration"] + 1


def check_same_end(expected: Path, output: Path) -> None:
    """Weights, average, optimizer, momenta, schedules and the iterations of the log are equal to the bit."""
    ends = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (expected, output)]
    assert same(*ends), f"{output} ended elsewhere than {expected}"
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    iterations = [line["iteration"] for line in lines]
    assert iterations == sorted(set(iterations)), f"metrics.json tells an iteration twice: {iterations}"
    assert not list(output.glob(".*.tmp")), "an unfinished file was left"


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(times: int, others: bool, draw: random.Random, folder: Path) -> None:
    from tiny_detector import ARCHITECTURES  # this folder is on a script's path

    kill_and_resume(folder, "rcnn", LONG, ("an iteration", "a write"), times, draw)
    for architecture in [name for name in ARCHITECTURES if name != "rcnn" and others]:
        kill_and_resume(folder, architecture, SHORT, ("the third iteration",), 1, draw)


def kill_and_resume(
    folder: Path, architecture: str, words: Sequence[Any], kinds: Sequence[str], times: int, draw: random.Random
) -> None:
    """Kill `times` trainings in the middle of each of `kinds`, and compare where they end with an undisturbed one."""
    from tiny_detector import write_training

    folder = folder / architecture
    folder.mkdir()
    config, expected = write_training(folder, architecture, *TRAINING, *words), folder / "undisturbed"
    seconds = finish(config, expected, lambda: log_sizes(folder / "sizes"))
    sizes = [[int(n) for n in part.split()] for part in (folder / "sizes").read_text().split("\n\n")]
    kills = {
        "an iteration": lambda output: kill_in_an_iteration(config, output, seconds, draw),
        "the third iteration": lambda output: kill_in_third_iteration(config, output),
        "a write": lambda output: kill_in_a_write(config, output, sizes, draw),
    }
    for kind in kinds:
        continued = []
        while len(continued) < times:
            output = Path(tempfile.mkdtemp(dir=folder))
            if kills[kind](output):
                continued.append(check_whole(output))
                finish(config, output)
                check_same_end(expected, output)
        found = ", ".join(map(str, continued))
        print(
            f"{architecture}: {times} of {times} killed in the middle of {kind} ended to the bit; resumed after "
            f"iterations {found}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="kills of each kind")
    parser.add_argument("--others", action="store_true", help="kill one of each other meta-architecture")
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(ROOT)
        main(options.times, options.others, random.Random(options.seed), Path(scratch))
    sys.exit()
