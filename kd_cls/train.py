#!/usr/bin/env python
"""Train a teacher, a plain student or a distilled student.

    python -m kd_cls.train --config-file configs/Digits/cls_deepkd.yaml [--resume] [KEY VALUE …]
    torchrun --nproc-per-node 8 -m kd_cls.train --config-file …

SEEDS runs several seeds in turn and reports mean ± std. Plain training and teachers: KD.LOSS.NAME none.
"""

import json
import logging
import math
import random
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_cls.build import build_distillation_loss, build_trainer
from kd_cls.checkpoint.checkpoint import BEST, LAST, read_checkpoint, read_metadata
from kd_cls.checks import check_config
from kd_cls.config import load_cfg
from kd_cls.data.build import augmentation, build_data
from kd_cls.distributed import Process, broadcast_object, start_process
from kd_cls.engine.cli import option_parser, run_command
from kd_cls.engine.solver import build_optimizer, build_scheduler
from kd_cls.engine.writers import setup_logging
from kd_cls.models.factory import build_student
from kd_cls.task.student import Student
from kd_cls.task.teacher import teacher_description
from kd_core.losses.feature_config import distils
from kd_core.utils.config import list_values, read_yaml
from kd_core.utils.files import set_aside, sweep_unfinished, write_text

logger = logging.getLogger("kd_cls")


def train(cfg: CfgNode, process: Process, resume: bool = False) -> dict[str, float]:
    """One run: everything it leaves is in OUTPUT_DIR.

    Args:
        resume: from OUTPUT_DIR/last.pth, where there is one; a run that is complete only reports.
    Returns:
        The last evaluation's metrics, `best_top1` and `seconds`.
    Raises:
        UserError: bad input, before training starts; DivergedError: a loss that is not finite.
    """
    check_config(cfg, process)
    if process.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    cfg = settle_seed(cfg, resume)
    train_missing_teacher(cfg, process)
    output = Path(cfg.OUTPUT_DIR)
    setup_logging(output, process.is_main)
    last = output / LAST
    resumes = broadcast_object(resume and last.is_file())
    trainer = build_trainer(cfg, process, read_metadata(last).get("input") if resumes else None)
    if resumes:
        trainer.resume(read_checkpoint(last, "--resume"))
        if trainer.iteration >= trainer.max_iter and trainer.evaluated:
            logger.info("%s is complete (%d iterations): there is nothing left to train", last, trainer.iteration)
    elif process.is_main:
        for path in (last, output / BEST, output / "metrics.json"):
            if kept := set_aside(path):
                logger.warning("%s is of an earlier run, and now called %s; --resume continues a run", path, kept.name)
    if process.is_main:
        sweep_unfinished(output)
        write_text(output / "config.yaml", cfg.dump())
    return trainer.run()


def settle_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """The config with a SEED below 0 drawn, or taken from the run that is resumed; frozen."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.SEED < 0:
        earlier = Path(cfg.OUTPUT_DIR, "config.yaml")
        drawn = random.SystemRandom().randrange(2**31)
        cfg.SEED = broadcast_object(read_yaml(str(earlier))["SEED"] if resume and earlier.is_file() else drawn)
    cfg.freeze()
    return cfg


def train_missing_teacher(cfg: CfgNode, process: Process) -> None:
    """Train the teacher of KD.TEACHER.CONFIG_FILE, or finish its training, where TRAIN_IF_MISSING asks for it."""
    node = cfg.KD.TEACHER
    if not distils(cfg.KD) or not node.TRAIN_IF_MISSING or node.WEIGHTS or not node.CONFIG_FILE:
        return
    _, _, weights, own = teacher_description(cfg)
    if not broadcast_object(read_metadata(weights).get("finished", False)):
        check_student(cfg)
        own.DEVICE = cfg.DEVICE
        setup_logging(Path(own.OUTPUT_DIR), process.is_main)
        logger.info(
            "there is no trained teacher in %s: training it first (KD.TEACHER.TRAIN_IF_MISSING)", own.OUTPUT_DIR
        )
        train(own, process, resume=True)


def check_student(cfg: CfgNode) -> None:
    """Build loss, student, optimizer and schedule once: their errors are found before hours of a teacher's training."""
    data = build_data(cfg)
    build_distillation_loss(cfg, data.num_classes)
    student = Student(build_student(cfg, data.num_classes))
    build_scheduler(cfg, build_optimizer(cfg, student), math.ceil(len(data.train) / cfg.SOLVER.IMS_PER_BATCH))


def train_seeds(cfg: CfgNode, process: Process, resume: bool = False) -> dict[str, dict[str, float]]:
    """A run for each of SEEDS in OUTPUT_DIR/seed_<n>; OUTPUT_DIR/summary.json has {metric: {mean, std, values}}."""
    check_config(cfg, process)
    results = []
    for seed in cfg.SEEDS:
        own = cfg.clone()
        own.SEED, own.SEEDS, own.OUTPUT_DIR = seed, [], str(Path(cfg.OUTPUT_DIR, f"seed_{seed}"))
        if cfg.KD.TEACHER.CACHE_DIR and (augmentation(cfg) != "none" or cfg.DATA.VIEWS > 1):  # other draws
            own.KD.TEACHER.CACHE_DIR = str(Path(cfg.KD.TEACHER.CACHE_DIR, f"seed_{seed}"))
        results.append(train(own, process, resume))
    summary = {name: summarise([result[name] for result in results]) for name in results[0]}
    if process.is_main:
        write_text(Path(cfg.OUTPUT_DIR, "summary.json"), json.dumps(summary, indent=1))
        top1 = summary["top1"]
        logger.info("top-1 over seeds %s: %.2f ± %.2f", list(cfg.SEEDS), top1["mean"], top1["std"])
    return summary


def summarise(values: list[float]) -> dict[str, object]:
    """Mean, sample standard deviation (0 for one value) and the values."""
    return {
        "mean": statistics.mean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """The command."""
    parser = option_parser(__doc__)
    parser.add_argument("--resume", action="store_true", help="continue from OUTPUT_DIR/last.pth")
    parser.add_argument("--list-keys", action="store_true", help="print every key and its value, and exit")
    options = parser.parse_intermixed_args(arguments)
    cfg = load_cfg(options.config_file, options.options)
    if options.list_keys:
        print(list_values(cfg))
        return {}
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
    with start_process(cfg.DEVICE) as process:
        return train_seeds(cfg, process, options.resume) if cfg.SEEDS else train(cfg, process, options.resume)


def command() -> None:
    """The console command."""
    run_command(main)


if __name__ == "__main__":
    command()
