"""The optimizer over gradient streams and timm's learning-rate schedule, from a config."""

from typing import Any

from fvcore.common.config import CfgNode
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer

from kd_cls.task.student import Student
from kd_core.optim import config, deepkd_sgd
from kd_core.optim.config import STREAM_OPTIMIZERS, build_stream_optimizer
from kd_core.optim.gsnr import AutoMomenta
from kd_core.utils.errors import UserError


def build_optimizer(cfg: CfgNode, student: Student) -> Optimizer:
    """The optimizer of SOLVER.OPTIMIZER over the student's parameters.

    Raises:
        UserError: a hyperparameter that the optimizer refuses, such as a momentum of 1 or more.
    """
    solver, groups = cfg.SOLVER, parameter_groups(cfg, student)
    if solver.OPTIMIZER in STREAM_OPTIMIZERS:
        return build_stream_optimizer(solver, groups)
    common: dict[str, Any] = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "momentum": solver.MOMENTUM}
    try:
        if solver.OPTIMIZER != "sgd":
            return create_optimizer_v2(groups, opt=solver.OPTIMIZER, **common)
        equal = {"delta_tog": 0.0, "delta_tcg": 0.0, "delta_ncg": 0.0}  # torch.optim.SGD, one backward pass
        return deepkd_sgd(groups, **common, **equal, nesterov=solver.NESTEROV, step=solver.STEP)
    except ValueError as error:
        raise UserError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER}: {error}") from error


def build_auto_momenta(cfg: CfgNode, optimizer: Optimizer, student: Student) -> AutoMomenta | None:
    """What SOLVER.MOMENTA auto asks for, None otherwise.

    Raises:
        UserError: an optimizer without streams, a window with fewer than two samples, or momenta outside [0, 1).
    """
    streams = hasattr(optimizer, "set_momenta") and cfg.KD.LOSS.NAME != "none"
    if cfg.SOLVER.MOMENTA == "auto" and not streams:
        raise UserError(
            f"SOLVER.MOMENTA auto compares the gradient streams of a distillation loss; with SOLVER.OPTIMIZER "
            f"{cfg.SOLVER.OPTIMIZER!r} and KD.LOSS.NAME {cfg.KD.LOSS.NAME!r} there are none: leave it empty"
        )
    return config.build_auto_momenta(cfg.SOLVER, optimizer, student.named_parameters())


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
