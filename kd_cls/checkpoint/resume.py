"""Whether a checkpoint is of the run that a config describes."""

from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_cls.config import get_cfg
from kd_cls.config_merge import all_keys, lookup, merge_mapping

# Keys that may differ between a run and its continuation: where files are, what is shown, how fast it goes.
FREE = (
    "OUTPUT_DIR",
    "DEVICE",
    "LOG_PERIOD",
    "SEEDS",
    "WANDB.ENABLED",
    "WANDB.PROJECT",
    "MODEL.COMPILE",
    "MODEL.WEIGHTS",
    "DATA.ROOT",
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
    """Refuse to continue another run: another schedule, method or network would end nowhere in particular.

    Raises:
        ValueError: no state to go on from, or keys that differ, with both values.
    """
    if "training" not in checkpoint or "metadata" not in checkpoint:
        raise ValueError(
            "--resume: this checkpoint holds weights only; last.pth, which training writes, can be gone on with"
        )
    written = written_config(checkpoint["metadata"]["config"])
    differing = [(key, lookup(written, key), lookup(cfg, key)) for key in all_keys(cfg) if key not in FREE]
    differing = [row for row in differing if row[1] != row[2]]
    if differing:
        key, old, new = differing[0]
        raise ValueError(
            f"--resume: the run in OUTPUT_DIR {cfg.OUTPUT_DIR} was started with {key} {old!r}, now it is {new!r}"
            + (f" (and {len(differing) - 1} more keys)" if len(differing) > 1 else "")
            + ": that is another run. Use the old value, or another OUTPUT_DIR"
        )


def written_config(text: str) -> CfgNode:
    """The config in a checkpoint, keys of an older version left out and new ones at their defaults."""
    cfg = get_cfg()
    known = set(all_keys(cfg))
    merge_mapping(cfg, prune(yaml.safe_load(text), known), "the checkpoint's config")
    return cfg


def prune(values: dict[str, Any], known: set[str], prefix: str = "") -> dict[str, Any]:
    """`values` without the keys that are not `known`."""
    kept = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            kept[name] = prune(value, known, key + ".")
        elif key in known:
            kept[name] = value
    return {name: value for name, value in kept.items() if value != {}}
