"""Every check of a config in one list: `train_net.py` stops at the first that fails, `dry_run.py` shows them all."""

import difflib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils import comm
from fvcore.common.registry import Registry
from torch import nn

from kd_core.losses.feature_config import check_feature, distils
from kd_core.utils.config import flatten, lookup
from kd_core.utils.errors import UserError
from kd_core.utils.wandb import import_wandb
from kd_det.checkpoint.checkpointer import check_local_file, misfit_of
from kd_det.compat import NO_DEEPLAB
from kd_det.config import build_box_loss, kd_defaults
from kd_det.data import check_dataset, check_same_classes, register_datasets
from kd_det.data.bad_images import check_on_bad_image
from kd_det.data.loader import check_sampler
from kd_det.data.two_sizes import check_scale
from kd_det.evaluation.evaluator import evaluator_kind
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys, distilled_architecture, distilled_names
from kd_det.modeling.teacher.acceleration import TeacherSpeed
from kd_det.modeling.teacher.build import check_teacher_weights, each_teacher, named_in_list, teacher_config
from kd_det.solver import check_images, check_solver, check_values, scale_to_world_size

NAMES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
}
# detectron2's words for: the ROI heads have a box head of their own; proposals are read from files.
NO_PART = {"MODEL.ROI_BOX_HEAD.NAME": "", "MODEL.PROPOSAL_GENERATOR.NAME": "PrecomputedProposals"}
CONVERT_HINT = "tools/convert_weights.py makes ImageNet weights of ResNets"


@dataclass(frozen=True)
class Check:
    """A check of a config.

    Attributes:
        key: the config key that it is about.
        run: raises a UserError where it fails.
    """

    key: str
    run: Callable[[], object]


def check_before_training(cfg: CfgNode, resume: bool) -> None:
    """Raise the UserError of the first of `training_checks` that fails, for the processes that run."""
    resume = resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    for check in training_checks(cfg, comm.get_world_size(), resume):
        check.run()


def check_before_evaluation(cfg: CfgNode) -> None:
    """The same for an evaluation, which needs no training set and no teacher."""
    for check in (*name_checks(cfg), *data_checks(cfg, ("TEST",))):
        check.run()
    if cfg.TEST.AUG.ENABLED:
        raise UserError("TEST.AUG.ENABLED is True, which the evaluation does not read: set it to False")


def failures(checks: Iterable[Check]) -> dict[str, str]:
    """message → key of every check that fails."""
    found: dict[str, str] = {}
    for check in checks:
        try:
            check.run()
        except (UserError, OSError) as error:
            found.setdefault(str(error), check.key)
    return found


def training_checks(cfg: CfgNode, world_size: int = 1, resume: bool = False) -> Iterator[Check]:
    """Every check of a training, in the order in which they are made. Nothing is built and nothing downloaded.

    Args:
        cfg: the training's config.
        world_size: number of processes.
        resume: the run was checked when it began, and its weights come from a checkpoint: neither is checked again.
    """
    kd, weights = cfg.KD, cfg.MODEL.WEIGHTS
    yield Check("SOLVER", partial(check_solver, cfg))
    yield Check("SOLVER.IMS_PER_BATCH", partial(check_batch, cfg, world_size))
    yield Check("MODEL", partial(check_synchronised_norms, cfg, world_size))
    yield from name_checks(cfg)
    yield Check("MODEL.META_ARCHITECTURE", partial(check_meta_architecture, cfg))
    yield Check("MODEL.TIMM", partial(check_backbone, cfg))
    yield Check("MODEL.SEM_SEG_HEAD.NAME", partial(check_segmentation_head, cfg))
    yield Check("KD.LOSS.WARMUP_ITERS", partial(check_max_iter, cfg))
    yield Check("KD.LOSS", partial(check_loss, cfg))
    yield Check("KD.FEATURE", partial(check_feature, kd.FEATURE, "WARMUP_ITERS", cfg.SOLVER.MAX_ITER))
    yield Check("KD", partial(check_architecture_options, cfg))
    yield Check("KD.TEACHER.DTYPE", partial(TeacherSpeed.from_config, cfg))
    yield Check("KD.TEACHER.IMAGE_SCALE", partial(check_scale, kd.TEACHER.IMAGE_SCALE))
    yield Check("DATALOADER.SAMPLER_TRAIN", partial(check_sampler, cfg.DATALOADER.SAMPLER_TRAIN))
    yield Check("DATASETS.BAD_IMAGES", partial(check_on_bad_image, cfg.DATASETS.BAD_IMAGES))
    if cfg.WANDB.ENABLED:
        yield Check("WANDB.ENABLED", import_wandb)
    if not resume:
        yield Check("KD", partial(check_unread, cfg))
        yield Check("MODEL.BACKBONE.FREEZE_AT", partial(check_frozen_stem, cfg))
    yield from data_checks(cfg, ("TRAIN", "TEST"))
    for name in cfg.DATASETS.TEST:
        yield Check("DATASETS.TEST", partial(check_evaluator, name))
    if not resume:
        for key, path in (("MODEL.WEIGHTS", weights), ("MODEL.TIMM.WEIGHTS", cfg.MODEL.TIMM.WEIGHTS)):
            yield Check(key, partial(check_local_file, key, path, CONVERT_HINT))
    yield from teacher_checks(cfg)


def name_checks(cfg: CfgNode) -> Iterator[Check]:
    """The names of the model's parts."""
    for key, registry in NAMES.items():
        yield Check(key, partial(check_name, cfg, key, registry))


def data_checks(cfg: CfgNode, needed: tuple[str, ...]) -> Iterator[Check]:
    """The data sets of DATASETS.<key>, each by itself; the first of `needed` must name one."""
    yield Check("DATASETS.REGISTER", partial(register_datasets, cfg))
    yield Check(f"DATASETS.{needed[0]}", partial(check_named, cfg, needed[0]))
    for key in needed:
        for name in cfg.DATASETS[key]:
            yield Check(f"DATASETS.{key}", partial(check_dataset, cfg, key, name))
    yield Check("DATASETS", partial(check_same_classes, cfg, needed))


def teacher_checks(cfg: CfgNode) -> Iterator[Check]:
    """Config and weights of every teacher, where there is a loss."""
    if not distils(cfg.KD):
        return
    try:
        teachers = each_teacher(cfg)
    except UserError:
        yield Check("KD.TEACHERS", partial(each_teacher, cfg))
        return
    for index, one in enumerate(teachers):
        group = f"KD.TEACHERS[{index}]" if cfg.KD.TEACHERS else "KD.TEACHER"
        for key, check in (("CONFIG_FILE", teacher_config), ("WEIGHTS", check_teacher_weights)):
            run = partial(named_in_list, index, check) if cfg.KD.TEACHERS else check
            yield Check(f"{group}.{key}", partial(run, one))


def check_named(cfg: CfgNode, key: str) -> None:
    """Refuse an empty DATASETS.TRAIN or DATASETS.TEST."""
    if not cfg.DATASETS[key]:
        raise UserError(f"DATASETS.{key} is empty: name a data set, or add your own with DATASETS.REGISTER")


def check_evaluator(name: str) -> None:
    """Refuse a test set that could not be evaluated once the training has come so far."""
    if name in DatasetCatalog:  # else `check_dataset` says so
        evaluator_kind(name)


def check_batch(cfg: CfgNode, world_size: int) -> None:
    """Refuse a batch that `world_size` processes cannot share."""
    check_values(cfg.SOLVER)
    solver = scale_to_world_size(cfg, world_size).SOLVER
    check_images(solver.IMS_PER_BATCH, world_size, solver.ACCUMULATE_STEPS)


def check_max_iter(cfg: CfgNode) -> None:
    """The warm-ups of the losses must fit into the training."""
    last = cfg.SOLVER.MAX_ITER
    for key in ("KD.LOSS.WARMUP_ITERS", "KD.FEATURE.WARMUP_ITERS"):
        if not 0 <= lookup(cfg, key) <= last:
            raise UserError(f"{key} is {lookup(cfg, key)}: it must lie in [0, {last}], SOLVER.MAX_ITER")


def check_name(cfg: CfgNode, key: str, registry: Registry) -> None:
    """Refuse a name that is in none of detectron2's or this package's registrations."""
    name = lookup(cfg, key)
    if name not in registry and name != NO_PART.get(key):
        near = difflib.get_close_matches(name, [known for known, _ in registry], n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else "import the module that registers it first"
        raise UserError(f"{key} is {name!r}, which is not registered: {hint}")


def check_meta_architecture(cfg: CfgNode) -> None:
    """Refuse a distillation loss with a model that does not read it: the training would be a plain one."""
    key = "KD.LOSS.NAME" if cfg.KD.LOSS.NAME != "none" else "KD.FEATURE.NAME"
    if distils(cfg.KD) and distilled_architecture(cfg.MODEL.META_ARCHITECTURE) is None:
        raise UserError(
            f"{key} is {lookup(cfg, key)!r} but MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE!r}, "
            f"which does not distil: set MODEL.META_ARCHITECTURE {' or '.join(distilled_names())}, or {key} none"
        )


def check_loss(cfg: CfgNode) -> None:
    """Build the loss as the meta-architecture does."""
    architecture = distilled_architecture(cfg.MODEL.META_ARCHITECTURE)
    build_box_loss(cfg) if architecture is None else architecture.build_loss(cfg)


def check_architecture_options(cfg: CfgNode) -> None:
    """The keys of KD that the meta-architecture reads."""
    architecture = distilled_architecture(cfg.MODEL.META_ARCHITECTURE)
    if architecture is not None:
        architecture.check_config(cfg)


def check_unread(cfg: CfgNode) -> None:
    """Refuse values that somebody chose and nothing reads, because of the value of another key.

    A baseline (KD.LOSS none) may keep the keys of distillation, and plain sgd those of a stream optimizer, so that one
    word on the command line is enough to compare with them.
    """
    sampler = f"DATALOADER.SAMPLER_TRAIN {cfg.DATALOADER.SAMPLER_TRAIN}"
    model = f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}"
    repeats = cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    # Key or group of keys → (whether it is read, what decides that).
    readers = {f"DATALOADER.{key}": (repeats, sampler) for key in ("REPEAT_THRESHOLD", "REPEAT_SQRT")}
    readers["TEST.AUG.ENABLED"] = (False, "the evaluation")
    architecture = distilled_architecture(cfg.MODEL.META_ARCHITECTURE)
    if distils(cfg.KD) and architecture is not None:
        known = dict.fromkeys(key for name in distilled_names() for key in distilled_architecture(name).option_keys)
        readers |= {key: (key in architecture.option_keys, model) for key in known} | {
            f"SOLVER.{key}": (cfg.SOLVER.OPTIMIZER != "stream_adamw", f"SOLVER.OPTIMIZER {cfg.SOLVER.OPTIMIZER}")
            for key in ("STEP", "NESTEROV")
        }
        if "KD.ROWS" in architecture.option_keys:
            readers["KD.BACKGROUND_WEIGHT"] = (cfg.KD.ROWS == "weighted", f"KD.ROWS {cfg.KD.ROWS}")
    values, defaults = flatten(cfg), flatten(kd_defaults())
    unread = [
        f"{key} is {value!r}, which {reader} does not read: set it to {defaults[key]!r}"
        for group, (is_read, reader) in readers.items()
        for key, value in values.items()
        if not is_read and f"{key}.".startswith(f"{group}.") and value != defaults.get(key, value)
    ]
    if unread:
        raise UserError("; ".join(unread))


def check_backbone(cfg: CfgNode) -> None:
    """Refuse MODEL.TIMM with a backbone that does not read it, and frozen statistics of random layers."""
    timm, name = cfg.MODEL.TIMM, cfg.MODEL.BACKBONE.NAME
    if (timm.NAME or timm.PRETRAINED or timm.WEIGHTS) and "timm" not in name:
        raise UserError(
            f"MODEL.TIMM (NAME {timm.NAME!r}) is set, but MODEL.BACKBONE.NAME {name} does not read it: set "
            "MODEL.BACKBONE.NAME build_timm_fpn_backbone or build_timm_backbone, or leave MODEL.TIMM at its defaults"
        )
    if timm.NORM == "FrozenBN" and not (cfg.MODEL.WEIGHTS or timm.PRETRAINED or timm.WEIGHTS):
        raise UserError(
            "MODEL.TIMM.NORM is FrozenBN and there are no weights: statistics of random layers would stay frozen. Give "
            "MODEL.TIMM.PRETRAINED True, MODEL.TIMM.WEIGHTS or MODEL.WEIGHTS, or set MODEL.TIMM.NORM BN"
        )


def check_segmentation_head(cfg: CfgNode) -> None:
    """Refuse a segmentation head that is not registered, where the meta-architecture has one."""
    name = cfg.MODEL.SEM_SEG_HEAD.NAME
    if PIXEL_CLASSES in class_keys(cfg.MODEL.META_ARCHITECTURE) and name not in SEM_SEG_HEADS_REGISTRY:
        hint = NO_DEEPLAB if name.startswith("DeepLab") else "detectron2 has no such head, and none is registered"
        raise UserError(f"MODEL.SEM_SEG_HEAD.NAME is {name}: {hint}")


def check_frozen_stem(cfg: CfgNode) -> None:
    """Refuse frozen layers without pretrained weights."""
    from_timm = cfg.MODEL.TIMM.PRETRAINED or cfg.MODEL.TIMM.WEIGHTS
    if not cfg.MODEL.WEIGHTS and not from_timm and cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        raise UserError(
            f"MODEL.WEIGHTS is empty and MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}: "
            "random layers would stay frozen. Give MODEL.WEIGHTS (tools/convert_weights.py makes them), "
            "or set MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_frozen_weights(model: nn.Module, incompatible: Any, path: str) -> None:
    """Refuse a weights file that lacks weights which stay frozen; made once the file is loaded.

    Args:
        model: the student.
        incompatible: what fvcore's checkpointer could not match.
        path: MODEL.WEIGHTS.

    Raises:
        UserError: a frozen parameter still has its random initial value.
    """
    misfit = misfit_of(incompatible)
    unmatched = {*misfit.missing, *(name for name, *_ in misfit.shapes)}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and name in unmatched]
    if frozen:
        raise UserError(
            f"MODEL.WEIGHTS: {path} lacks {len(frozen)} weights that stay frozen, the first is {frozen[0]}: they would "
            "stay random. Give a file that has them (tools/convert_weights.py makes ImageNet weights of ResNets), or "
            "train them with MODEL.BACKBONE.FREEZE_AT 0"
        )


def check_synchronised_norms(cfg: CfgNode, world_size: int) -> None:
    """Refuse torch's SyncBN in several processes on the CPU, which it does not support."""
    if world_size == 1 or cfg.MODEL.DEVICE != "cpu":
        return
    for key, norm in norms(cfg.MODEL, "MODEL"):
        if norm in ("SyncBN", "nnSyncBN"):
            other = "BN" if key == "MODEL.TIMM.NORM" else "naiveSyncBN, or BN"  # timm's networks know no other
            raise UserError(
                f"{key} {norm} synchronises GPUs only, and this training runs in {world_size} processes on the CPU: "
                f"set {key} {other}"
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
