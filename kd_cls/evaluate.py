#!/usr/bin/env python
"""Evaluate a trained network: `python -m kd_cls.evaluate --config-file output/…/config.yaml [KEY VALUE …]`.

Reads best.pth in OUTPUT_DIR; needs no teacher. MODEL.WEIGHTS on the command line names another file. That of the config
is where the training started: it is read only where OUTPUT_DIR has no best.pth. Every image counts exactly once,
whatever the number of processes (`torchrun --nproc-per-node 8 -m kd_cls.evaluate …`).
"""

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_cls.build import autocast_dtype
from kd_cls.checkpoint.checkpoint import BEST, fetch, load_weights, read_metadata
from kd_cls.config import load_cfg
from kd_cls.data.build import build_data, build_loaders
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process, start_process
from kd_cls.engine.cli import option_parser, run_command
from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.writers import setup_logging
from kd_cls.models.factory import create_network, input_stats
from kd_core.utils.errors import UserError

logger = logging.getLogger("kd_cls")


def evaluate_checkpoint(cfg: CfgNode, process: Process) -> dict[str, float]:
    """The metrics of the weights in MODEL.WEIGHTS (empty: best.pth in OUTPUT_DIR) on the validation images of DATA.

    In the precision of training, SOLVER.AMP.

    Raises:
        UserError: no such file, another architecture, or another number of classes than the data set's.
    """
    model, loader, _ = open_checkpoint(cfg, process)
    return evaluate(model, loader, process, autocast_dtype(cfg))


def open_checkpoint(cfg: CfgNode, process: Process) -> tuple[nn.Module, Iterable[tuple[Tensor, Tensor]], list[str]]:
    """The network of `evaluate_checkpoint` in eval mode, the loader of the validation images, the names of the classes.

    MODEL.NAME says which network it is. Its input statistics come from the checkpoint, for files of others from the
    config.
    """
    key = "MODEL.WEIGHTS" if cfg.MODEL.WEIGHTS else "OUTPUT_DIR"
    path = fetch(cfg.MODEL.WEIGHTS or str(Path(cfg.OUTPUT_DIR, BEST)), key)
    metadata = read_metadata(path)
    logger.info("evaluating %s", path)
    data = build_data(cfg)
    if metadata.get("num_classes", data.num_classes) != data.num_classes:
        raise UserError(
            f"{key}: {path} knows {metadata['num_classes']} classes, {cfg.DATA.NAME} has {data.num_classes}"
        )
    model = create_network(cfg.MODEL.NAME, data.num_classes, cfg.MODEL.KWARGS, False, "MODEL")
    load_weights(model, path, key)
    written = metadata.get("input")
    stats = (
        InputStats(tuple(written["mean"]), tuple(written["std"]), written["size"])
        if written
        else input_stats(cfg, model)
    )
    loader = build_loaders(cfg, data, stats, process).val
    return model.to(process.device).eval(), loader, list(data.train.classes)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """The command."""
    options = option_parser(__doc__).parse_args(arguments)
    cfg = load_cfg(options.config_file, options.options)
    if "MODEL.WEIGHTS" not in options.options and Path(cfg.OUTPUT_DIR, BEST).is_file():
        cfg.MODEL.WEIGHTS = ""
    with start_process(cfg.DEVICE) as process:
        setup_logging(None, process.is_main)
        metrics = evaluate_checkpoint(cfg, process)
        if process.is_main:
            print(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    run_command(main)
