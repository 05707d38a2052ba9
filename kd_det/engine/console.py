"""What the console shows while a tool starts: a few lines about the training; log.txt has everything."""

import logging
import sys
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kd_core.losses.feature_config import distils
from kd_core.utils.report.runs import method_title

LOGGERS = ("fvcore", "detectron2", "kd_det", "kd_core")
logger = logging.getLogger(__name__)


def only_warnings(record: logging.LogRecord) -> bool:
    """A filter that lets warnings through, and the lines of `describe`."""
    return record.levelno >= logging.WARNING or record.name == __name__


def open_logs(output_dir: str) -> None:
    """The loggers of detectron2 and ours, to the console of rank 0 and to log.txt.

    The first two calls are those of `default_setup`, which detectron2 remembers: it adds no second handler.
    """
    rank = comm.get_rank()
    setup_logger(output_dir, distributed_rank=rank, name="fvcore")
    setup_logger(output_dir, distributed_rank=rank)
    for name in ("kd_det", "kd_core"):
        setup_logger(output_dir, distributed_rank=rank, name=name, abbrev_name=name)


def console_handlers() -> list[logging.Handler]:
    streams = (sys.stdout, sys.__stdout__)
    handlers = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    return [handler for handler in handlers if getattr(handler, "stream", None) in streams]


def quiet_console() -> None:
    """Keep config, environment and model off the console until `restore_console`."""
    for handler in console_handlers():
        handler.addFilter(only_warnings)


def restore_console() -> None:
    """End `quiet_console`."""
    for handler in console_handlers():
        handler.removeFilter(only_warnings)


def describe(cfg: CfgNode, parameters: int, trained: int, images: int, start_iter: int) -> None:
    """What is trained, by whom, on what, and for how long.

    Args:
        parameters: of the student; `trained`, those that are not frozen.
        images: of the training set.
        start_iter: above 0 where a training is resumed.
    """
    solver = cfg.SOLVER
    teachers = [name for name, *_ in cfg.KD.TEACHERS] or [cfg.KD.TEACHER.CONFIG_FILE]
    weights = [path for _, path, *_ in cfg.KD.TEACHERS] or [cfg.KD.TEACHER.WEIGHTS]
    epochs = solver.MAX_ITER * solver.IMS_PER_BATCH / max(images, 1)
    backbone = cfg.MODEL.TIMM.NAME or f"{cfg.MODEL.BACKBONE.NAME}, depth {cfg.MODEL.RESNETS.DEPTH}"
    taught = ", ".join(f"{name} with {path}" for name, path in zip(teachers, weights, strict=True))
    test_sets = ", ".join(cfg.DATASETS.TEST) or "nothing"
    lines = {
        "method": method_title({"KD": cfg.KD, "SOLVER": solver}),
        "student": f"{cfg.MODEL.META_ARCHITECTURE} ({backbone}), {parameters / 1e6:.2f} M parameters, "
        f"{trained / 1e6:.2f} M of them trained",
        "teacher": taught if distils(cfg.KD) else "none",
        "data": f"{', '.join(cfg.DATASETS.TRAIN)} ({images} images), evaluated on {test_sets}",
        "schedule": f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images ({epochs:.1f} epochs), "
        f"{solver.OPTIMIZER}, learning rate {solver.BASE_LR:g}, seed {cfg.SEED}",
        "device": f"{cfg.MODEL.DEVICE}, {comm.get_world_size()} process(es)",
        "folder": f"{Path(cfg.OUTPUT_DIR)} (log.txt has config, environment and model; report.html follows)",
    }
    if start_iter:
        lines["resumed"] = f"at iteration {start_iter}"
    say(lines)


def say(lines: dict[str, str]) -> None:
    """Log names and values in a way that `quiet_console` lets through."""
    for name, words in lines.items():
        logger.info("%-9s %s", name, words)
