"""What can be known to be wrong before hours are spent."""

import os
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from kd_core.utils.errors import UserError
from kd_det.checkpoint.checkpointer import misfit_of
from kd_det.data import check_datasets, register_datasets
from kd_det.modeling.teacher.acceleration import TeacherSpeed


def check_data(cfg: CfgNode, training: bool) -> None:
    """Register the data sets of one's own and see that every named data set is there; evaluation needs no training
    set.
    """
    register_datasets(cfg)
    needed = "TRAIN" if training else "TEST"
    if not cfg.DATASETS[needed]:
        raise UserError(f"DATASETS.{needed} is empty: name a data set, or add one's own with DATASETS.REGISTER")
    check_datasets(cfg, ("TRAIN", "TEST") if training else ("TEST",))


def check_before_training(cfg: CfgNode, resume: bool) -> None:
    """Refuse a training that cannot come to anything.

    Raises:
        UserError: names the key and the fix.
    """
    check_meta_architecture(cfg)
    check_backbone(cfg)
    check_max_iter(cfg)
    TeacherSpeed.from_config(cfg)
    if not (resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        check_frozen_stem(cfg)
        check_weights(cfg)


def check_weights(cfg: CfgNode) -> None:
    """A local file that MODEL.WEIGHTS names must be there; names with a scheme (detectron2://) are fetched later."""
    weights = cfg.MODEL.WEIGHTS
    if weights and "://" not in weights and not os.path.isfile(weights):
        raise UserError(
            f"MODEL.WEIGHTS: there is no file {weights} (tools/convert_weights.py makes ImageNet weights of ResNets)"
        )


def check_max_iter(cfg: CfgNode) -> None:
    """The warm-up of the loss must fit into the training."""
    warmup = cfg.KD.LOSS.WARMUP_ITERS
    if not 0 <= warmup <= cfg.SOLVER.MAX_ITER:
        raise UserError(
            f"KD.LOSS.WARMUP_ITERS is {warmup}: it must lie in [0, {cfg.SOLVER.MAX_ITER}], SOLVER.MAX_ITER"
        )


def check_meta_architecture(cfg: CfgNode) -> None:
    """A loss that no model reads would be a plain training under another name."""
    if cfg.KD.LOSS.NAME != "none" and cfg.MODEL.META_ARCHITECTURE != "DistilledRCNN":
        raise UserError(
            f"KD.LOSS.NAME is {cfg.KD.LOSS.NAME!r} but MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, "
            "which does not distil: set MODEL.META_ARCHITECTURE DistilledRCNN, or KD.LOSS.NAME none"
        )


def check_backbone(cfg: CfgNode) -> None:
    """Keys that the backbone does not read would be another network than the one that was meant."""
    timm, name = cfg.MODEL.TIMM, cfg.MODEL.BACKBONE.NAME
    if (timm.NAME or timm.PRETRAINED or timm.WEIGHTS) and "timm" not in name:
        raise UserError(
            f"MODEL.TIMM (NAME {timm.NAME!r}) is set, but MODEL.BACKBONE.NAME {name} does not read it: set "
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone, or leave MODEL.TIMM as it is by default"
        )
    if timm.NORM == "FrozenBN" and not (cfg.MODEL.WEIGHTS or timm.PRETRAINED or timm.WEIGHTS):
        raise UserError(
            "MODEL.TIMM.NORM is FrozenBN and there are no weights: statistics of random layers would stay frozen. Give "
            "MODEL.TIMM.PRETRAINED True, MODEL.TIMM.WEIGHTS or MODEL.WEIGHTS, or set MODEL.TIMM.NORM BN"
        )


def check_frozen_stem(cfg: CfgNode) -> None:
    """Frozen layers must have been trained by someone."""
    by_timm = cfg.MODEL.TIMM.PRETRAINED or cfg.MODEL.TIMM.WEIGHTS
    if not cfg.MODEL.WEIGHTS and not by_timm and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise UserError(
            f"MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}: "
            "random layers would stay frozen. Give MODEL.WEIGHTS (tools/convert_weights.py makes them), "
            "or set MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_frozen_weights(model: nn.Module, incompatible: Any, path: str) -> None:
    """Every frozen weight of the student must have come out of its weights file.

    Args:
        model: the student.
        incompatible: what fvcore's checkpointer could not match.
        path: MODEL.WEIGHTS.

    Raises:
        UserError: a frozen parameter is as random as it was drawn.
    """
    misfit = misfit_of(incompatible)
    unmatched = {*misfit.missing, *(name for name, *_ in misfit.shapes)}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name in unmatched]
    if frozen:
        raise UserError(
            f"MODEL.WEIGHTS: {path} lacks {len(frozen)} weights that stay frozen, the first is {frozen[0]}: they would "
            "be random to the end. Give a file that has them (tools/convert_weights.py makes ImageNet weights of "
            "ResNets), or train them with MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_synchronised_norms(cfg: CfgNode, world_size: int) -> None:
    """Refuse SyncBN on CPU processes, which torch's cannot serve.

    Raises:
        UserError: names the key and what to use instead.
    """
    if world_size == 1 or cfg.MODEL.DEVICE != "cpu":
        return
    for key, norm in norms(cfg.MODEL, "MODEL"):
        if norm in ("SyncBN", "nnSyncBN"):
            raise UserError(
                f"{key} {norm} synchronises GPUs only, and this training runs in {world_size} processes on the CPU: "
                f"set {key} naiveSyncBN, or BN"
            )


def norms(node: CfgNode, name: str) -> list[tuple[str, str]]:
    """Every (key, value) called NORM below `node`."""
    found = []
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found += norms(value, f"{name}.{key}")
        elif key == "NORM":
            found.append((f"{name}.{key}", value))
    return found
