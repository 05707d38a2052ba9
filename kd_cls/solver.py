"""The optimizer over gradient streams and timm's learning-rate schedule, from a config."""

from typing import Any

from fvcore.common.config import CfgNode
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from kd_cls.student import Student
from kd_core import optim as streams
from kd_core.gsnr import AutoMomenta

STREAM_OPTIMIZERS = ("dot_sgd", "deepkd_sgd", "stream_adamw")
SCHEDULES = ("multistep", "cosine", "step", "poly", "tanh", "wsd", "rsqrt", "constant")


def check_solver(cfg: CfgNode, world_size: int) -> None:
    """Refuse what no run could mean.

    Raises:
        ValueError: names the key, its value and what is expected.
    """
    solver = cfg.SOLVER
    known = (*STREAM_OPTIMIZERS, *list_optimizers())
    rules = [
        (
            "OPTIMIZER",
            solver.OPTIMIZER,
            solver.OPTIMIZER in known,
            f"sgd, {', '.join(STREAM_OPTIMIZERS)} or a name of timm's",
        ),
        ("BASE_LR", solver.BASE_LR, solver.BASE_LR >= 0, "a number ≥ 0"),
        ("EPOCHS", solver.EPOCHS, solver.EPOCHS > 0, "a number above 0"),
        ("STEP", solver.STEP, solver.STEP in ("paper", "matched"), "paper or matched"),
        ("MOMENTA", solver.MOMENTA, solver.MOMENTA in ("", "auto"), "empty or auto"),
        ("SCHEDULE.NAME", solver.SCHEDULE.NAME, solver.SCHEDULE.NAME in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("AMP.DTYPE", solver.AMP.DTYPE, solver.AMP.DTYPE in ("float16", "bfloat16"), "float16 or bfloat16"),
        (
            "DISTRIBUTE_BN",
            solver.DISTRIBUTE_BN,
            solver.DISTRIBUTE_BN in ("reduce", "broadcast", ""),
            "reduce, broadcast or empty",
        ),
        ("LABEL_SMOOTHING", solver.LABEL_SMOOTHING, 0 <= solver.LABEL_SMOOTHING < 1, "a number in [0, 1)"),
        ("EVAL_PERIOD", solver.EVAL_PERIOD, solver.EVAL_PERIOD >= 1, "a whole number ≥ 1"),
        ("CHECKPOINT_PERIOD", solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_PERIOD >= 0, "a whole number ≥ 0"),
        ("ACCUMULATE_STEPS", solver.ACCUMULATE_STEPS, solver.ACCUMULATE_STEPS >= 1, "a whole number ≥ 1"),
        (
            "CLIP_GRADIENTS.CLIP_VALUE",
            solver.CLIP_GRADIENTS.CLIP_VALUE,
            solver.CLIP_GRADIENTS.CLIP_VALUE > 0,
            "a number above 0",
        ),
    ]
    for key, value, good, expected in rules:
        if not good:
            raise ValueError(f"SOLVER.{key} is {value!r}, expected {expected}")
    parts = world_size * solver.ACCUMULATE_STEPS
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % parts:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, expected a multiple of {parts} ({world_size} processes × "
            f"SOLVER.ACCUMULATE_STEPS {solver.ACCUMULATE_STEPS})"
        )
    if solver.OPTIMIZER in ("dot_sgd", "deepkd_sgd") and cfg.KD.LOSS.NAME == "none":
        raise ValueError(
            f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, which gives distillation a momentum of its own, but "
            "KD.LOSS.NAME is 'none': use sgd, or a distillation loss"
        )


def build_optimizer(cfg: CfgNode, student: Student) -> Optimizer:
    """The optimizer of SOLVER.OPTIMIZER over the student's parameters.

    Raises:
        ValueError: a hyperparameter that the optimizer refuses, such as a momentum of 1 or more.
    """
    try:
        return create_optimizer(cfg, student)
    except ValueError as error:
        raise ValueError(f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER}: {error}") from error


def create_optimizer(cfg: CfgNode, student: Student) -> Optimizer:
    """As `build_optimizer`, with the optimizer's own errors."""
    solver = cfg.SOLVER
    groups = parameter_groups(cfg, student)
    common: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    sgd = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV, "step": solver.STEP}
    deltas = {stream: solver.DEEPKD[f"DELTA_{stream.upper()}"] for stream in ("tog", "tcg", "ncg")}
    if solver.OPTIMIZER == "sgd":  # equal momenta: torch.optim.SGD, one backward pass
        return streams.deepkd_sgd(groups, **common, **sgd, delta_tog=0.0, delta_tcg=0.0, delta_ncg=0.0)
    if solver.OPTIMIZER == "deepkd_sgd":
        return streams.deepkd_sgd(groups, **common, **sgd, **{f"delta_{name}": delta for name, delta in deltas.items()})
    if solver.OPTIMIZER == "dot_sgd":
        return streams.dot_sgd(groups, **common, **sgd, delta=solver.DOT.DELTA)
    if solver.OPTIMIZER == "stream_adamw":
        return streams.StreamAdamW(groups, **common, momenta={name: solver.MOMENTUM + d for name, d in deltas.items()})
    return create_optimizer_v2(groups, opt=solver.OPTIMIZER, **common, momentum=solver.MOMENTUM)


def build_auto_momenta(cfg: CfgNode, optimizer: Optimizer, student: Student) -> AutoMomenta | None:
    """What SOLVER.MOMENTA auto asks for, None otherwise.

    Raises:
        ValueError: an optimizer without streams, a window with fewer than two samples, or momenta outside [0, 1).
    """
    if cfg.SOLVER.MOMENTA != "auto":
        return None
    if not hasattr(optimizer, "set_momenta") or cfg.KD.LOSS.NAME == "none":
        raise ValueError(
            f"SOLVER.MOMENTA auto compares the gradient streams of a distillation loss; with SOLVER.OPTIMIZER "
            f"{cfg.SOLVER.OPTIMIZER!r} and KD.LOSS.NAME {cfg.KD.LOSS.NAME!r} there are none: leave it empty"
        )
    gsnr = cfg.SOLVER.GSNR
    try:
        return AutoMomenta(
            optimizer, student.named_parameters(), gsnr.WINDOW, gsnr.PERIOD, gsnr.SAMPLE, cfg.SOLVER.MOMENTUM, gsnr.SPAN
        )
    except ValueError as error:
        raise ValueError(f"SOLVER.GSNR: {error}") from error


def parameter_groups(cfg: CfgNode, student: Student) -> list[dict[str, Any]]:
    """Trained parameters, with and without weight decay.

    The serialization layer does not decay (ours): decay pulls towards 0, and that layer starts from the identity.
    """
    kept = set()
    if student.serialization is not None:
        kept = {f"serialization.{name}" for name, _ in student.serialization.named_parameters()}
    if not cfg.SOLVER.DECAY_NORM_AND_BIAS:
        kept |= {f"model.{name}" for name in getattr(student.model, "no_weight_decay", set)()}
    exclude_norms = not cfg.SOLVER.DECAY_NORM_AND_BIAS
    return param_groups_weight_decay(student, cfg.SOLVER.WEIGHT_DECAY, exclude_norms, kept)


def build_scheduler(cfg: CfgNode, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, stepped after each optimizer step: the rate is a pure function of the iteration."""
    schedule = cfg.SOLVER.SCHEDULE
    # timm's multistep decays one step before a milestone (it compares with t + 1): half a step more makes it exact.
    milestones = [milestone + 0.5 / steps_per_epoch for milestone in schedule.MILESTONES]
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=schedule.NAME,
        num_epochs=cfg.SOLVER.EPOCHS,
        decay_epochs=schedule.DECAY_EPOCHS,
        decay_milestones=milestones,
        decay_rate=schedule.GAMMA,
        min_lr=schedule.MIN_LR,
        warmup_lr=schedule.WARMUP_LR,
        warmup_epochs=schedule.WARMUP_EPOCHS,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler
