"""The optimizer over gradient streams and timm's learning-rate schedule, from a config."""

import logging
from typing import Any

from fvcore.common.config import CfgNode
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from kd_cls.task.student import Student
from kd_core.optim import deepkd_sgd
from kd_core.optim.config import STREAM_OPTIMIZERS, build_stream_optimizer
from kd_core.utils.errors import UserError

logger = logging.getLogger("kd_cls")


def build_optimizer(cfg: CfgNode, student: Student, feature: nn.Module | None = None) -> Optimizer:
    """The optimizer of SOLVER.OPTIMIZER over the parameters of the student, and of a feature loss.

    Raises:
        UserError: a hyperparameter that the optimizer refuses, such as a momentum of 1 or more.
    """
    solver, groups = cfg.SOLVER, parameter_groups(cfg, student, feature)
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


def parameter_groups(cfg: CfgNode, student: Student, feature: nn.Module | None = None) -> list[dict[str, Any]]:
    """The trained parameters in groups with and without weight decay: the student's, and those of a feature loss.

    The serialization layer has none (ours): decay pulls towards 0, and that layer starts from the identity.
    """
    undecayed = set()
    if student.serialization is not None:
        undecayed = {f"serialization.{name}" for name, _ in student.serialization.named_parameters()}
    if not cfg.SOLVER.DECAY_NORM_AND_BIAS:
        undecayed |= {f"model.{name}" for name in getattr(student.model, "no_weight_decay", set)()}
    exclude_norms = not cfg.SOLVER.DECAY_NORM_AND_BIAS
    groups = param_groups_weight_decay(student, cfg.SOLVER.WEIGHT_DECAY, exclude_norms, undecayed)
    if feature is not None:
        groups += param_groups_weight_decay(feature, cfg.SOLVER.WEIGHT_DECAY, exclude_norms)
    return groups


def build_scheduler(cfg: CfgNode, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's schedule, updated after each optimizer step: the learning rate is a pure function of the iteration.

    Raises:
        UserError: what timm's schedule refuses, such as a decay of wsd that is longer than the training.
    """
    schedule = cfg.SOLVER.SCHEDULE
    # timm's multistep compares milestones with t + 1, and so decays one step early: half a step more makes it exact.
    milestones = [milestone + 0.5 / steps_per_epoch for milestone in schedule.MILESTONES]
    warn_of_what_never_comes(cfg)
    before = schedule.WARMUP_EPOCHS if schedule.WARMUP_PREFIX else 0
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=schedule.NAME,
            num_epochs=cfg.SOLVER.EPOCHS - before,
            decay_epochs=schedule.DECAY_EPOCHS,
            decay_milestones=milestones,
            decay_rate=schedule.GAMMA,
            min_lr=schedule.MIN_LR,
            warmup_lr=schedule.WARMUP_LR,
            warmup_epochs=schedule.WARMUP_EPOCHS,
            warmup_prefix=schedule.WARMUP_PREFIX,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except ValueError as error:  # in iterations
        raise UserError(
            f"SOLVER.SCHEDULE {schedule.NAME} of SOLVER.EPOCHS {cfg.SOLVER.EPOCHS:g} with DECAY_EPOCHS "
            f"{schedule.DECAY_EPOCHS:g}, WARMUP_EPOCHS {schedule.WARMUP_EPOCHS:g}, {steps_per_epoch} iterations an "
            f"epoch: {error}"
        ) from error
    return scheduler


def warn_of_what_never_comes(cfg: CfgNode) -> None:
    """A config of many epochs that is run for a few, as a trial, keeps its milestones and the loss's warm-up."""
    epochs, schedule = cfg.SOLVER.EPOCHS, cfg.SOLVER.SCHEDULE
    if schedule.NAME == "multistep" and (late := [epoch for epoch in schedule.MILESTONES if epoch >= epochs]):
        logger.warning(
            "SOLVER.SCHEDULE.MILESTONES %s are not reached in SOLVER.EPOCHS %g: the learning rate does not fall there",
            late,
            epochs,
        )
    for name in ("LOSS", "FEATURE"):
        if cfg.KD[name].NAME != "none" and epochs < cfg.KD[name].WARMUP_EPOCHS:
            logger.warning(
                "KD.%s.WARMUP_EPOCHS %g are more than SOLVER.EPOCHS %g: the weight of distillation rises to the end",
                name,
                cfg.KD[name].WARMUP_EPOCHS,
                epochs,
            )
