"""Whether a checkpoint is of the run that a config describes."""

from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_cls.config import get_cfg
from kd_core.utils.errors import UserError
from kd_core.utils.resume import check_same_run

# Keys that may differ between a run and its resumption: where files are, what is shown, how fast it goes.
IGNORED_ON_RESUME = (
    "OUTPUT_DIR",
    "DEVICE",
    "LOG_PERIOD",
    "SEEDS",
    "WANDB",
    "REPORT",
    "MODEL.COMPILE",
    "MODEL.CHANNELS_LAST",
    "MODEL.WEIGHTS",
    "DATA.ROOT",
    "DATA.BAD_IMAGES",
    "DATA.DOWNLOAD",
    "DATA.NUM_WORKERS",
    "DATA.VAL_BATCH",
    "KD.TEACHER.EVALUATE",
    "KD.TEACHER.COMPILE",
    "KD.TEACHER.FOLD_BN",
    "KD.TEACHER.CHANNELS_LAST",
    "KD.TEACHER.CACHE_DIR",
    "KD.TEACHER.TRAIN_IF_MISSING",
    "KD.LOSS.COMPILE",
    "SOLVER.CUDA_GRAPH",
    "SOLVER.EVAL_PERIOD",
    "SOLVER.CHECKPOINT_PERIOD",
)


def check_resumable(checkpoint: dict[str, Any], cfg: CfgNode) -> None:
    """Refuse to resume from weights alone, or from the checkpoint of another run.

    Raises:
        UserError: the checkpoint holds no training, or names the first key that differs, with both values.
    """
    if "training" not in checkpoint or "metadata" not in checkpoint:
        raise UserError(
            "--resume: this checkpoint holds weights only; resume from last.pth, which training writes, or give it as "
            "MODEL.WEIGHTS to a new run"
        )
    saved = yaml.safe_load(checkpoint["metadata"]["config"])
    check_same_run(saved, cfg, get_cfg(), IGNORED_ON_RESUME, f"the run in OUTPUT_DIR {cfg.OUTPUT_DIR}")


def check_same_data(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume on other images than a run began with, by the metadata of its checkpoint and of this run.

    Raises:
        UserError: another number of classes, or of iterations under the same config.
    """
    for name, what in (("num_classes", "classes"), ("max_iter", "iterations")):
        if saved.get(name, now[name]) != now[name]:
            raise UserError(
                f"--resume: the run was started with {saved[name]} {what}, now there are {now[name]}: the images under "
                "DATA.ROOT have changed. Start a new run in another OUTPUT_DIR"
            )
