"""The optimizer that SOLVER.OPTIMIZER names, over detectron2's parameter groups."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_core.optim import StreamOptimizer
from kd_core.optim.config import STREAM_OPTIMIZERS, build_stream_optimizer, check_streams
from kd_core.train_step import clip_gradients
from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError
from kd_det.compat import merged_parameter_groups

OPTIMIZERS = ("sgd", *STREAM_OPTIMIZERS)
# detectron2's: every element, every parameter's norm; and the norm of the whole model's gradient.
CLIP_TYPES = ("value", "norm", "full_model")


def check_solver(cfg: CfgNode, world_size: int = 1) -> None:
    """Refuse invalid solver settings.

    Raises:
        UserError: names the key, its value and what is expected.
    """
    solver = cfg.SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        raise UserError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}, expected one of {', '.join(OPTIMIZERS)}")
    check_values(solver)
    check_images(solver.IMS_PER_BATCH, world_size, solver.ACCUMULATE_STEPS)
    check_streams(solver, cfg.KD, STREAM_OPTIMIZERS)
    check_clipping(solver)


def check_values(solver: CfgNode) -> None:
    """Refuse values that mean nothing, whatever the optimizer is; a UserError as `check_solver`'s."""
    expected = {
        "MAX_ITER": (solver.MAX_ITER >= 1, "a whole number ≥ 1"),
        "BASE_LR": (solver.BASE_LR >= 0, "a number ≥ 0"),
        "STEP": (solver.STEP in ("paper", "matched"), "paper or matched"),
        "MOMENTA": (solver.MOMENTA in ("", "auto"), "empty or auto"),
        "ACCUMULATE_STEPS": (solver.ACCUMULATE_STEPS >= 1, "a whole number ≥ 1"),
        "CHECKPOINT_PERIOD": (solver.CHECKPOINT_PERIOD >= 1, "a whole number ≥ 1"),
        "EMA.DECAY": (0 <= solver.EMA.DECAY < 1, "a number in [0, 1)"),
        "AMP.DTYPE": (solver.AMP.DTYPE in ("float16", "bfloat16"), "float16 or bfloat16"),
    }
    for key, (good, what) in expected.items():
        if not good:
            raise UserError(f"SOLVER.{key} is {lookup(solver, key)!r}, expected {what}")


def scale_to_world_size(cfg: CfgNode, world_size: int) -> CfgNode:
    """`cfg` for `world_size` processes, where SOLVER.REFERENCE_WORLD_SIZE says for how many it was written.

    detectron2 scales batch, learning rate and schedule (arXiv 1706.02677). With κ = processes / reference, the
    iterations of our keys are divided by κ too, and the decay of the moving average is raised to the power of κ, so
    that it looks back over the same images (arXiv 2307.13813).

    Raises:
        UserError: a batch that the reference does not divide.
    """
    solver, reference = cfg.SOLVER, cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference in (0, world_size):
        return cfg
    if reference < 0 or solver.IMS_PER_BATCH % reference:
        raise UserError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}: it must divide SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH}, "
            "or be 0 to scale nothing"
        )
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size)
    frozen, factor = scaled.is_frozen(), world_size / reference
    scaled.defrost()
    for node in (scaled.KD.LOSS, scaled.KD.FEATURE):
        node.WARMUP_ITERS = round(node.WARMUP_ITERS / factor)
    scaled.SOLVER.GSNR.PERIOD = max(round(solver.GSNR.PERIOD / factor), 1)
    scaled.SOLVER.CHECKPOINT_PERIOD = max(scaled.SOLVER.CHECKPOINT_PERIOD, 1)
    scaled.TEST.EVAL_PERIOD = max(scaled.TEST.EVAL_PERIOD, min(cfg.TEST.EVAL_PERIOD, 1))  # 0 stays 0: no evaluation
    scaled.SOLVER.GSNR.WINDOW = round(solver.GSNR.WINDOW / factor)
    scaled.SOLVER.EMA.DECAY = solver.EMA.DECAY**factor
    if frozen:
        scaled.freeze()
    return scaled


def check_images(images: int, world_size: int, accumulate_steps: int) -> None:
    """Every micro-batch of every process has the same number of images."""
    if images < 1 or images % (world_size * accumulate_steps):
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {images} must be a positive multiple of the {world_size} processes × "
            f"SOLVER.ACCUMULATE_STEPS {accumulate_steps}"
        )


def check_clipping(solver: CfgNode) -> None:
    """Refuse clipping that would act only on the sum of the streams."""
    clip = solver.CLIP_GRADIENTS
    if clip.CLIP_TYPE not in CLIP_TYPES:
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}, expected one of {', '.join(CLIP_TYPES)}"
        )
    if solver.OPTIMIZER != "sgd" and clip.ENABLED and clip.CLIP_TYPE == "value":
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE {clip.CLIP_TYPE!r} acts on single elements, "
            f"which is not defined for the streams of SOLVER.OPTIMIZER {solver.OPTIMIZER}: set it to norm or full_model"
        )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """The optimizer over every parameter of `model` that is trained.

    "sgd" is detectron2's own. The others have the same parameter groups (SOLVER.WEIGHT_DECAY_NORM, BIAS_LR_FACTOR, …),
    equal ones merged. Parameters in `model.no_decay` have no weight decay.

    Raises:
        UserError: momenta outside [0, 1) and other values that the optimizer refuses, with their keys.
    """
    check_solver(cfg)
    if cfg.SOLVER.OPTIMIZER == "sgd":
        optimizer = build_detectron2_optimizer(without_whole_model_clipping(cfg), model)
    else:
        optimizer = build_stream_optimizer(cfg.SOLVER, parameter_groups(cfg, model))
    exempt_from_decay(optimizer, getattr(model, "no_decay", ()))
    return optimizer


def without_whole_model_clipping(cfg: CfgNode) -> CfgNode:
    """A config whose optimizer clips each parameter by itself or not at all: the step clips the whole model."""
    if cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "full_model":
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    return cfg


def build_clip(cfg: CfgNode, optimizer: Optimizer) -> Callable[[], object] | None:
    """The function that clips the gradients between backward and step (SOLVER.CLIP_GRADIENTS).

        norm        the gradient of each parameter by itself, all its streams by one factor: detectron2's meaning
        full_model  the gradient of the whole model, all streams by one factor

    None where nothing is clipped, and where detectron2's own SGD clips in its step.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or not (isinstance(optimizer, StreamOptimizer) or clip.CLIP_TYPE == "full_model"):
        return None
    if clip.CLIP_TYPE == "full_model":
        return partial(clip_gradients, optimizer, clip.CLIP_VALUE, clip.NORM_TYPE)
    return partial(optimizer.clip_each_grad_norm_, clip.CLIP_VALUE, clip.NORM_TYPE)


def parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """detectron2's parameter groups, equal ones merged."""
    return merged_parameter_groups(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
    )


def exempt_from_decay(optimizer: Optimizer, params: Iterable[Tensor]) -> None:
    """Move `params` to groups of their own, like those they were in but without weight decay."""
    exempt = set(params)
    if not exempt:
        return
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if p in exempt]
        group["params"] = [p for p in group["params"] if p not in exempt]
        if moved:
            optimizer.add_param_group({**group, "params": moved, "weight_decay": 0.0})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
