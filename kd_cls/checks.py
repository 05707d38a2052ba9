"""Values that no run could mean, refused before anything is built."""

from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode
from timm.optim import list_optimizers

from kd_core.optim.config import STREAM_OPTIMIZERS
from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError

SCHEDULES = ("multistep", "cosine", "step", "poly", "tanh", "wsd", "rsqrt", "constant")


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """A rule for words."""
    return (lambda value: value in names), f"one of {', '.join(name or 'empty' for name in names)}"


def at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    """A rule for numbers with a lower bound."""
    return (lambda value: value >= least), f"a number ≥ {least}"


ABOVE_0 = ((lambda value: value > 0), "a number above 0")
SHARE = ((lambda value: 0 <= value < 1), "a number in [0, 1)")
OPTIMIZER = (
    lambda value: value in (*STREAM_OPTIMIZERS, *list_optimizers()),
    f"sgd, {', '.join(STREAM_OPTIMIZERS)} or a name of timm's optimizers",
)
SEEDS = (lambda value: all(type(seed) is int and seed >= 0 for seed in value), "a list of whole numbers ≥ 0")

# Key → (whether a value is good, what is expected).
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "SEEDS": SEEDS,
    "LOG_PERIOD": at_least(1),
    "DATA.AUGMENTATION_EPOCHS": at_least(0),
    "DATA.INPUT_SIZE": at_least(0),
    "DATA.NUM_WORKERS": at_least(0),
    "KD.TASK_WEIGHT": at_least(0),
    "KD.LOSS.WARMUP_EPOCHS": at_least(0),
    "KD.TEACHER.CACHE": one_of("none", "full", "topk"),
    "KD.TEACHER.DTYPE": one_of("float32", "bfloat16", "float16"),
    "SOLVER.OPTIMIZER": OPTIMIZER,
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.STEP": one_of("paper", "matched"),
    "SOLVER.MOMENTA": one_of("", "auto"),
    "SOLVER.EPOCHS": ABOVE_0,
    "SOLVER.ACCUMULATE_STEPS": at_least(1),
    "SOLVER.SCHEDULE.NAME": one_of(*SCHEDULES),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ABOVE_0,
    "SOLVER.AMP.DTYPE": one_of("float16", "bfloat16"),
    "SOLVER.EMA.DECAY": SHARE,
    "SOLVER.LABEL_SMOOTHING": SHARE,
    "SOLVER.MIXUP.ALPHA": at_least(0),
    "SOLVER.MIXUP.CUTMIX_ALPHA": at_least(0),
    "SOLVER.DISTRIBUTE_BN": one_of("reduce", "broadcast", ""),
    "SOLVER.CHECKPOINT_PERIOD": at_least(0),
    "SOLVER.EVAL_PERIOD": at_least(1),
}


def check_config(cfg: CfgNode, world_size: int) -> None:
    """Refuse what no run could mean.

    Raises:
        UserError: names the key, its value and what is expected.
    """
    for key, (good, expected) in RULES.items():
        if not good(lookup(cfg, key)):
            raise UserError(f"{key} is {lookup(cfg, key)!r}, expected {expected}")
    check_batch(cfg, world_size)
    if cfg.SOLVER.CUDA_GRAPH:
        check_graph(cfg, world_size)
    if cfg.SOLVER.OPTIMIZER in ("dot_sgd", "deepkd_sgd") and cfg.KD.LOSS.NAME == "none":
        raise UserError(
            f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, which gives distillation a momentum of its own, but "
            "KD.LOSS.NAME is 'none': use sgd, or a distillation loss"
        )


def check_batch(cfg: CfgNode, world_size: int) -> None:
    """Refuse a batch that does not divide into its parts."""
    solver = cfg.SOLVER
    parts = world_size * solver.ACCUMULATE_STEPS
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % parts:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, expected a multiple of {parts} ({world_size} processes × "
            f"SOLVER.ACCUMULATE_STEPS {solver.ACCUMULATE_STEPS})"
        )
    share = solver.IMS_PER_BATCH // world_size
    if mixes(cfg) and share % 2:
        raise UserError(
            f"SOLVER.MIXUP mixes pairs of images, but SOLVER.IMS_PER_BATCH leaves {share} to each process: use an even "
            "share"
        )


def check_graph(cfg: CfgNode, world_size: int) -> None:
    """Refuse what a CUDA graph of the whole step cannot hold: work of the host between its kernels."""
    solver, optimizers = cfg.SOLVER, ("sgd", "dot_sgd", "deepkd_sgd")
    cached = cfg.KD.LOSS.NAME != "none" and cfg.KD.TEACHER.CACHE != "none"
    fp16 = solver.AMP.ENABLED and solver.AMP.DTYPE == "float16"
    refused = {
        f"{world_size} processes, which exchange gradients": (world_size > 1, "start one"),
        f"SOLVER.OPTIMIZER {solver.OPTIMIZER}, which counts its steps on the host": (
            solver.OPTIMIZER not in optimizers,
            f"use {', '.join(optimizers)}",
        ),
        f"SOLVER.ACCUMULATE_STEPS {solver.ACCUMULATE_STEPS}": (solver.ACCUMULATE_STEPS > 1, "set it to 1"),
        "SOLVER.MIXUP, drawn on the host": (mixes(cfg), "set ALPHA and CUTMIX_ALPHA to 0"),
        "SOLVER.MOMENTA auto, which looks at some steps only": (solver.MOMENTA == "auto", "leave it empty"),
        "SOLVER.AMP.DTYPE float16, whose loss scaler may skip a step": (fp16, "use bfloat16"),
        f"KD.TEACHER.CACHE {cfg.KD.TEACHER.CACHE}, read from disk": (cached, "set it to none"),
    }
    for what, (found, fix) in refused.items():
        if found:
            raise UserError(f"SOLVER.CUDA_GRAPH True does not go with {what}: {fix}, or set SOLVER.CUDA_GRAPH False")


def mixes(cfg: CfgNode) -> bool:
    """Whether timm's Mixup mixes the images of a batch."""
    return cfg.SOLVER.MIXUP.ALPHA > 0 or cfg.SOLVER.MIXUP.CUTMIX_ALPHA > 0
