"""LazyConfig trainings in processes of their own, for tests/tools/test_lazyconfig_train_net.py."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import default_argument_parser

from kd_det.config import kd_defaults
from kd_det.data import register_datasets
from kd_det.engine.lazy_trainer import LazyTrainer, main

from .forked import started

TINY = str(Path(__file__).parent / "tiny_lazy.py")


def arguments(output: Path, *words: str, config: str = TINY) -> Any:
    """The parsed command line; words that begin with -- are options."""
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if not word.startswith("--")]
    line = ["--config-file", config, "--num-gpus", "0", *options, f"train.output_dir={output}", *overrides]
    return default_argument_parser().parse_args(line)


def register(entry: list[str]) -> str:
    """Register an entry of DATASETS.REGISTER; returns the override that evaluates on it."""
    cfg = kd_defaults()
    cfg.DATASETS.REGISTER = [entry]
    register_datasets(cfg)
    return f"dataloader.test.dataset.names={entry[0]}"


def train(output: Path, entry: list[str], *words: str) -> None:
    """Train, evaluated on the entry's images."""
    main(arguments(output, register(entry), *words))


def train_and_die(output: Path, entry: list[str], *words: str) -> None:
    """Die in the fourth iteration, before its step: the last checkpoint is that of the second."""
    run_step = LazyTrainer.run_step

    def fatal(trainer: LazyTrainer) -> None:
        if trainer.iter == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        run_step(trainer)

    LazyTrainer.run_step = fatal
    train(output, entry, *words)


def quietly(function: Callable[..., None], *args: Any) -> None:
    """Call the function with its output dropped."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    function(*args)


def in_a_process(function: Callable[..., None], *args: Any) -> int | None:
    """The exit code of `function(*args)` in a process of its own."""
    with started(quietly, function, *args) as process:
        process.join()
        return process.exitcode
