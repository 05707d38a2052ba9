"""Every check of a config that needs neither data nor networks. `check_config` walks them before anything is built."""

from collections.abc import Callable
from typing import Any

from fvcore.common.config import CfgNode
from timm.optim import list_optimizers

from kd_cls.data.bad_images import ON_BAD_IMAGE
from kd_cls.distributed import Process
from kd_cls.task.features import PREACT
from kd_core.losses.feature_config import check_feature, distils
from kd_core.optim.config import STREAM_OPTIMIZERS, check_streams
from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError
from kd_core.utils.wandb import import_wandb

SGD = ("sgd", "dot_sgd", "deepkd_sgd")
SCHEDULES = ("multistep", "cosine", "step", "poly", "tanh", "wsd", "rsqrt", "constant")


def one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    """A rule for names."""
    return (lambda value: value in names), f"one of {', '.join(name or 'empty' for name in names)}"


def at_least(least: float) -> tuple[Callable[[Any], bool], str]:
    """A rule for numbers with a lower bound."""
    return (lambda value: value >= least), f"a number ≥ {least}"


ABOVE_0 = ((lambda value: value > 0), "a number above 0")
SHARE = ((lambda value: 0 <= value < 1), "a number in [0, 1)")
OPTIMIZER = (
    lambda value: value in (*STREAM_OPTIMIZERS, *list_optimizers()) and value != "adahessian",  # needs create_graph
    f"sgd, {', '.join(STREAM_OPTIMIZERS)} or a name of timm's optimizers",
)
RISING = (
    lambda value: all(type(epoch) in (int, float) for epoch in value) and value == sorted(value),
    "epochs in rising order",
)
SEEDS = (
    lambda value: all(type(seed) is int and seed >= 0 for seed in value) and len(set(value)) == len(value),
    "a list of different whole numbers ≥ 0",
)

# Key → (whether a value is valid, what is expected).
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "SEEDS": SEEDS,
    "LOG_PERIOD": at_least(1),
    "DATA.AUGMENTATION_EPOCHS": at_least(0),
    "DATA.BAD_IMAGES": one_of(*ON_BAD_IMAGE),
    "DATA.INPUT_SIZE": at_least(0),
    "DATA.NUM_WORKERS": at_least(0),
    "DATA.VAL_BATCH": at_least(0),
    "DATA.VIEWS": ((lambda value: value in (1, 2)), "1 or 2"),
    "KD.TASK_WEIGHT": at_least(0),
    "KD.LOSS.WARMUP_EPOCHS": at_least(0),
    "KD.FEATURE.WARMUP_EPOCHS": at_least(0),
    "KD.FEATURE.PREACT": one_of(*PREACT),
    "KD.TEACHER.CACHE": one_of("none", "full", "topk"),
    "KD.TEACHER.INPUT_SIZE": at_least(0),
    "KD.TEACHER.DTYPE": one_of("float32", "bfloat16", "float16"),
    "SOLVER.OPTIMIZER": OPTIMIZER,
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.STEP": one_of("paper", "matched"),
    "SOLVER.MOMENTA": one_of("", "auto"),
    "SOLVER.EPOCHS": ABOVE_0,
    "SOLVER.ACCUMULATE_STEPS": at_least(1),
    "SOLVER.SCHEDULE.NAME": one_of(*SCHEDULES),
    "SOLVER.SCHEDULE.MILESTONES": RISING,
    "SOLVER.SCHEDULE.GAMMA": at_least(0),
    "SOLVER.SCHEDULE.DECAY_EPOCHS": ABOVE_0,
    "SOLVER.SCHEDULE.MIN_LR": at_least(0),
    "SOLVER.SCHEDULE.WARMUP_EPOCHS": at_least(0),
    "SOLVER.SCHEDULE.WARMUP_LR": at_least(0),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ABOVE_0,
    "SOLVER.AMP.DTYPE": one_of("float16", "bfloat16"),
    "SOLVER.EMA.DECAY": SHARE,
    "SOLVER.LABEL_SMOOTHING": SHARE,
    "SOLVER.MIXUP.ALPHA": at_least(0),
    "SOLVER.MIXUP.CUTMIX_ALPHA": at_least(0),
    "SOLVER.MIXUP.PROB": ((lambda value: 0 <= value <= 1), "a number in [0, 1]"),
    "SOLVER.DISTRIBUTE_BN": one_of("reduce", "broadcast", ""),
    "SOLVER.CHECKPOINT_PERIOD": at_least(0),
    "SOLVER.EVAL_PERIOD": at_least(1),
}


def check_config(cfg: CfgNode, process: Process) -> None:
    """Walk all `CHECKS`.

    Raises:
        UserError: names the key, its value and what is expected.
    """
    for check in CHECKS:
        check(cfg, process)


def check_values(cfg: CfgNode, process: Process) -> None:
    """Refuse single values that no run can use."""
    for key, (is_valid, expected) in RULES.items():
        if not is_valid(lookup(cfg, key)):
            raise UserError(f"{key} is {lookup(cfg, key)!r}, expected {expected}")


def check_batch(cfg: CfgNode, process: Process) -> None:
    """Refuse a batch that does not divide evenly between processes and micro-batches."""
    solver, world_size = cfg.SOLVER, process.world_size
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


def check_schedule(cfg: CfgNode, process: Process) -> None:
    """Refuse a warm-up that leaves no epoch to a schedule which starts after it."""
    schedule, epochs = cfg.SOLVER.SCHEDULE, cfg.SOLVER.EPOCHS
    if schedule.WARMUP_PREFIX and epochs <= schedule.WARMUP_EPOCHS:
        raise UserError(
            f"SOLVER.SCHEDULE.WARMUP_EPOCHS is {schedule.WARMUP_EPOCHS} and SOLVER.EPOCHS {epochs}, which leaves none "
            "to the schedule: shorten the warm-up, or set WARMUP_PREFIX False"
        )


def check_loss(cfg: CfgNode, process: Process) -> None:
    """Refuse the loss that mixes foreground and background rows of a detector."""
    if cfg.KD.LOSS.NAME == "gdkds":
        raise UserError("KD.LOSS.NAME gdkds is a mix for foreground and background, as detectors have: use gdkd3")


def check_optimizer(cfg: CfgNode, process: Process) -> None:
    """Refuse an optimizer over gradient streams, or momenta drawn from them, where there are none; and keys of SGD."""
    solver = cfg.SOLVER
    check_streams(solver, cfg.KD, ("sgd", *STREAM_OPTIMIZERS))
    if solver.OPTIMIZER not in SGD:
        for key, default in (("NESTEROV", False), ("STEP", "paper")):
            if solver[key] != default:
                raise UserError(
                    f"SOLVER.{key} is {solver[key]!r}, which only {', '.join(SGD)} read, but SOLVER.OPTIMIZER is "
                    f"{solver.OPTIMIZER}: set SOLVER.{key} {default}"
                )
    if "kron" in solver.OPTIMIZER and process.world_size > 1:
        raise UserError(
            f"SOLVER.OPTIMIZER {solver.OPTIMIZER} draws random numbers in its step, other ones in each of "
            f"{process.world_size} processes, whose weights would drift apart: start one process, or use another"
        )


def check_augmentation(cfg: CfgNode, process: Process) -> None:
    """Refuse augmentations that repeat where the draws do not."""
    data = cfg.DATA
    if data.AUGMENTATION_EPOCHS and not (data.REPRODUCIBLE or data.RESIDENT):
        raise UserError(
            f"DATA.AUGMENTATION_EPOCHS is {data.AUGMENTATION_EPOCHS}, but DATA.REPRODUCIBLE False draws augmentations "
            "anew in every epoch: set DATA.REPRODUCIBLE True, or DATA.AUGMENTATION_EPOCHS 0"
        )


def check_cache(cfg: CfgNode, process: Process) -> None:
    """Refuse to cache a teacher's logits of images that are never seen again."""
    if not distils(cfg.KD) or cfg.KD.TEACHER.CACHE == "none" or (cfg.DATA.REPRODUCIBLE and not mixes(cfg)):
        return
    reason = "SOLVER.MIXUP mixes images at random" if mixes(cfg) else "DATA.REPRODUCIBLE is False"
    raise UserError(
        f"KD.TEACHER.CACHE {cfg.KD.TEACHER.CACHE} keeps logits of images that come again, and {reason}: set "
        "KD.TEACHER.CACHE none, or train without it"
    )


def check_views(cfg: CfgNode, process: Process) -> None:
    """Refuse what knows one view of an image only."""
    if cfg.DATA.VIEWS_AT_ONCE and (cfg.DATA.VIEWS == 1 or cfg.KD.FEATURE.NAME != "none"):
        raise UserError(
            "DATA.VIEWS_AT_ONCE puts two views through one pass, and maps are read view by view, but DATA.VIEWS is "
            f"{cfg.DATA.VIEWS} and KD.FEATURE.NAME {cfg.KD.FEATURE.NAME}: set it False"
        )
    if cfg.DATA.VIEWS == 1:
        return
    refused = {
        "SOLVER.MIXUP": (
            mixes(cfg),
            "a mixed image has no label and no confidence of its own: set ALPHA and CUTMIX_ALPHA to 0",
        ),
        "DATA.RESIDENT": (cfg.DATA.RESIDENT, "RandAugment works on single images: set it False"),
    }
    for key, (found, reason) in refused.items():
        if found:
            raise UserError(f"DATA.VIEWS 2 does not go with {key}, {reason}, or set DATA.VIEWS 1")


def check_features(cfg: CfgNode, process: Process) -> None:
    """Refuse what a feature loss cannot be trained with."""
    check_feature(cfg.KD.FEATURE, "WARMUP_EPOCHS", cfg.SOLVER.EPOCHS)
    if cfg.KD.FEATURE.NAME == "none":
        return
    images = cfg.SOLVER.IMS_PER_BATCH // (process.world_size * cfg.SOLVER.ACCUMULATE_STEPS)
    refused = {
        f"KD.TEACHER.CACHE {cfg.KD.TEACHER.CACHE}": (
            cfg.KD.TEACHER.CACHE != "none",
            "it keeps logits and no maps: set it to none",
        ),
        "MODEL.COMPILE and KD.TEACHER.COMPILE": (
            cfg.MODEL.COMPILE or cfg.KD.TEACHER.COMPILE,
            "what is compiled gives no maps: set both False",
        ),
        "SOLVER.CUDA_GRAPH": (cfg.SOLVER.CUDA_GRAPH, "its warm-up is a number of the host: set it False"),
        f"batches of {images} image(s) per forward pass": (
            images < 2,
            "BatchNorm of a 1×1 map needs two: raise SOLVER.IMS_PER_BATCH or lower SOLVER.ACCUMULATE_STEPS",
        ),
    }
    for what, (found, reason) in refused.items():
        if found:
            raise UserError(
                f"KD.FEATURE.NAME {cfg.KD.FEATURE.NAME} does not go with {what}: {reason}, or set KD.FEATURE.NAME none"
            )


def check_graph(cfg: CfgNode, process: Process) -> None:
    """Refuse what a CUDA graph of the whole step cannot hold: work of the host between its kernels."""
    if not cfg.SOLVER.CUDA_GRAPH:
        return
    solver, world_size = cfg.SOLVER, process.world_size
    fp16 = solver.AMP.ENABLED and solver.AMP.DTYPE == "float16"
    cached = distils(cfg.KD) and cfg.KD.TEACHER.CACHE != "none"
    refused = {
        f"{world_size} processes, which exchange gradients": (world_size > 1, "start one"),
        f"SOLVER.OPTIMIZER {solver.OPTIMIZER}, which counts its steps on the host": (
            solver.OPTIMIZER not in SGD,
            f"use {', '.join(SGD)}",
        ),
        f"SOLVER.ACCUMULATE_STEPS {solver.ACCUMULATE_STEPS}": (solver.ACCUMULATE_STEPS > 1, "set it to 1"),
        "SOLVER.MIXUP, drawn on the host": (mixes(cfg), "set ALPHA and CUTMIX_ALPHA to 0"),
        "SOLVER.MOMENTA auto, which measures some steps only": (solver.MOMENTA == "auto", "leave it empty"),
        "SOLVER.AMP.DTYPE float16, whose loss scaler may skip a step": (fp16, "use bfloat16"),
        f"KD.TEACHER.CACHE {cfg.KD.TEACHER.CACHE}, read from disk": (cached, "set it to none"),
        f"a run on {process.device.type}": (process.device.type != "cuda", "set DEVICE cuda where there is a GPU"),
    }
    for what, (found, fix) in refused.items():
        if found:
            raise UserError(f"SOLVER.CUDA_GRAPH True does not go with {what}: {fix}, or set SOLVER.CUDA_GRAPH False")


def check_wandb(cfg: CfgNode, process: Process) -> None:
    """Refuse WANDB.ENABLED without the wandb package."""
    if cfg.WANDB.ENABLED:
        import_wandb()


CHECKS: tuple[Callable[[CfgNode, Process], None], ...] = (
    check_values,
    check_batch,
    check_schedule,
    check_loss,
    check_optimizer,
    check_augmentation,
    check_cache,
    check_views,
    check_features,
    check_graph,
    check_wandb,
)


def mixes(cfg: CfgNode) -> bool:
    """Whether timm's Mixup mixes the images of a batch."""
    return cfg.SOLVER.MIXUP.ALPHA > 0 or cfg.SOLVER.MIXUP.CUTMIX_ALPHA > 0
