"""Builds a trainer from a config: data, student, teacher and its cache, losses, optimizer, schedule."""

import hashlib
import logging
import math
from copy import deepcopy
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.loss import create_classification_loss
from torch import nn

from kd_cls.checks import mixes
from kd_cls.config import config_hash
from kd_cls.data import DataSets, Loaders
from kd_cls.data.build import augmentation, build_data, build_loaders
from kd_cls.data.sampler import EpochSampler
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process, broadcast_weights, seed_step
from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.solver import build_optimizer, build_scheduler
from kd_cls.engine.trainer import Trainer
from kd_cls.models.factory import build_student, input_stats
from kd_cls.task.distillation import DistillationTask
from kd_cls.task.features import build_readers
from kd_cls.task.logit_cache import LogitCache
from kd_cls.task.student import Student
from kd_cls.task.teacher import Teacher, build_teacher
from kd_core.losses import DistillationLoss, SerializationLayer
from kd_core.losses.config import build_kd_loss
from kd_core.losses.feature_config import build_feature_loss, distils
from kd_core.optim.config import STREAM_OPTIMIZERS, build_auto_momenta
from kd_core.utils.errors import UserError
from kd_core.utils.state_dict import weights_digest

logger = logging.getLogger("kd_cls")


def build_trainer(
    cfg: CfgNode, process: Process, resumed: dict[str, Any] | None = None, sampler: EpochSampler | None = None
) -> Trainer:
    """The trainer of a config that has passed `check_config`.

    Args:
        cfg: the config.
        process: this process among all.
        resumed: as in `input_stats`.
        sampler: whose last batch is checked, where this is a trial of one process of several; None for the trainer's.

    Raises:
        UserError: data, weights, a network or a loss that does not exist or does not fit the rest of the config.
    """
    data = build_data(cfg)
    seed_step(cfg.SEED, 0, 0)  # the same initial weights on every process and for every method
    loss = build_distillation_loss(cfg, data.num_classes)
    model = build_student(cfg, data.num_classes)
    stats = input_stats(cfg, model, resumed)
    student = Student(model, serialization_layer(cfg, data.num_classes), cfg.MODEL.FREEZE_BN)
    loaders = build_loaders(cfg, data, stats, process)
    teacher = attach_teacher(cfg, data, stats, process) if distils(cfg.KD) else None
    criterion = create_classification_loss(smoothing=cfg.SOLVER.LABEL_SMOOTHING, soft_targets=mixes(cfg))
    check_last_batch(cfg, student, stats, sampler or loaders.train.sampler)
    features = build_features(cfg, model, stats, teacher)
    amp_dtype, device = autocast_dtype(cfg), process.device
    task = DistillationTask(
        student, teacher, loss, criterion, cfg.KD.TASK_WEIGHT, amp_dtype, device, cfg.DATA.VIEWS, **features,
        at_once=cfg.DATA.VIEWS_AT_ONCE,
    )  # fmt: skip
    for module in filter(None, (student, task.feature)):
        broadcast_weights(module)
    prepare_networks(cfg, task)
    if teacher is not None and cfg.KD.TEACHER.EVALUATE:
        report_teacher(teacher, loaders, process)
    optimizer = build_optimizer(cfg, student, task.feature)
    scheduler = build_scheduler(cfg, optimizer, loaders.train.sampler.num_batches)
    named = chain(*(module.named_parameters() for module in filter(None, (student, task.feature))))
    auto_momenta = build_auto_momenta(cfg.SOLVER, optimizer, named, task.streams.values())
    written = {"config": cfg.dump(), "config_hash": config_hash(cfg)}
    metadata = partial(describe, cfg, written, data.num_classes, stats)
    return Trainer(cfg, task, loaders, optimizer, scheduler, process, metadata, auto_momenta)


def build_distillation_loss(cfg: CfgNode, num_classes: int) -> DistillationLoss | None:
    """The loss of KD.LOSS, its warm-up as a share of the training; None for plain training.

    Raises:
        UserError: an unknown name, a parameter that the loss refuses for this number of classes, or mixed labels with a
            loss that needs a single target class.
    """
    loss = build_kd_loss(cfg.KD.LOSS, num_classes, "WARMUP_EPOCHS", cfg.SOLVER.EPOCHS, cfg.DATA.VIEWS)
    if loss is not None and mixes(cfg):
        check_mixed_labels(cfg, loss)
    return loss


def build_features(
    cfg: CfgNode, model: nn.Module, stats: InputStats, teacher: Teacher | None
) -> dict[str, Any]:
    """The feature loss of KD.FEATURE and the readers of its maps, as `DistillationTask` takes them; {} without one."""
    if cfg.KD.FEATURE.NAME == "none":
        return {}
    readers = build_readers(cfg, model, stats.size, teacher.model, teacher.stats.size)
    channels = (reader.channels for reader in readers)
    loss = build_feature_loss(cfg.KD.FEATURE, *channels, "WARMUP_EPOCHS", cfg.SOLVER.EPOCHS)
    return {"feature": loss, "readers": readers}


def check_last_batch(cfg: CfgNode, student: Student, stats: InputStats, sampler: EpochSampler) -> None:
    """Refuse a batch, or a micro-batch, of one image for a network that has a BatchNorm of a 1×1 map."""
    batch, steps = sampler.batch_size * sampler.world_size, cfg.SOLVER.ACCUMULATE_STEPS
    if sampler.batch_size == steps:
        cause = f"micro-batches of one image (SOLVER.IMS_PER_BATCH {batch}, SOLVER.ACCUMULATE_STEPS {steps})"
        fix = "fewer SOLVER.ACCUMULATE_STEPS"
    elif sampler.num_samples % sampler.batch_size == 1:
        cause = f"a last batch of one image, as {sampler.size} images leave with SOLVER.IMS_PER_BATCH {batch}"
        fix = f"DATA.TRAIN_IMAGES {sampler.size - sampler.world_size}"
    else:
        return
    if cfg.KD.FEATURE.NAME != "none":
        name = f"KD.FEATURE.NAME {cfg.KD.FEATURE.NAME}"
    elif not trains_on_one_image(student, stats.size):
        name = f"MODEL.NAME {cfg.MODEL.NAME} at {stats.size} px"
    else:
        return
    raise UserError(
        f"{name} does not go with {cause}: BatchNorm of a 1×1 map needs two. Set {fix}, or another SOLVER.IMS_PER_BATCH"
    )


def trains_on_one_image(student: Student, size: int) -> bool:
    """Whether a copy of a student takes one image in training mode."""
    copy = deepcopy(student).train()
    try:
        with torch.no_grad():
            copy(torch.zeros(1, 3, size, size))
    except ValueError:  # torch's own of BatchNorm
        return False
    return True


def check_mixed_labels(cfg: CfgNode, loss: DistillationLoss) -> None:
    """Refuse a loss that needs a single target class, which mixup does not leave.

    KD needs none where its terms are only summed: the sum is the full KL.
    """
    is_summed = cfg.SOLVER.OPTIMIZER not in STREAM_OPTIMIZERS and cfg.SOLVER.MOMENTA != "auto"
    whole_kl = cfg.KD.LOSS.NAME == "kd" and not cfg.KD.LOSS.TOPK.ENABLED and is_summed
    if loss.needs_target and not whole_kl:
        raise UserError(
            f"SOLVER.MIXUP mixes the labels of two images, and KD.LOSS.NAME {cfg.KD.LOSS.NAME!r} splits the classes by "
            "one label: set SOLVER.MIXUP.ALPHA and CUTMIX_ALPHA to 0, or use gdkd, gdkd3, dist, kd without TOPK and "
            f"streams (SOLVER.OPTIMIZER none of {', '.join(STREAM_OPTIMIZERS)}, SOLVER.MOMENTA empty), or dkd with "
            "KD.LOSS.DKD.PARTITION teacher_top1"
        )


def serialization_layer(cfg: CfgNode, num_classes: int) -> nn.Module | None:
    """AEKT's layer between the distilled logits and those of the task; None for other losses."""
    return SerializationLayer(num_classes) if cfg.KD.LOSS.NAME == "aekt" else None


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The dtype of SOLVER.AMP, None where it is off."""
    return getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None


def attach_teacher(cfg: CfgNode, data: DataSets, stats: InputStats, process: Process) -> Teacher:
    """The teacher on the device, with a cache of each view if KD.TEACHER.CACHE asks for them."""
    teacher = build_teacher(cfg, data.num_classes, stats)
    if cfg.KD.TEACHER.CACHE != "none":
        teacher.caches = [build_cache(cfg, data, teacher, view) for view in range(cfg.DATA.VIEWS)]
    return teacher.to(process.device)


def build_cache(cfg: CfgNode, data: DataSets, teacher: Teacher, view: int = 0) -> LogitCache:
    """The cache of the teacher's logits of this run's images, or of their second view.

    The first of two views is the image of training with one: both kinds of training share its cache.

    Raises:
        UserError: the folder holds the cache of another teacher, data set or augmentation.
    """
    name = augmentation(cfg)
    still = name == "none" and view == 0
    epochs = 1 if still else cfg.DATA.AUGMENTATION_EPOCHS or math.ceil(cfg.SOLVER.EPOCHS)
    identity = {
        "teacher": weights_digest(teacher.model.state_dict())[:16],
        "teacher input": list(teacher.stats),
        "student input": list(teacher.student_stats),
        "data": fingerprint(data.train),
        "augmentation": [name, cfg.DATA.TIMM_OPTIONS],
        "resident": cfg.DATA.RESIDENT and name != "none",  # whose crops and flips are other draws
        "epochs": epochs,
        "seed": None if still else cfg.SEED,
        "precision": str(teacher.speed.dtype if teacher.speed.casts else autocast_dtype(cfg)),
    }
    folder = Path(cfg.KD.TEACHER.CACHE_DIR or Path(cfg.OUTPUT_DIR, "teacher_cache"))
    if view:
        folder, identity["view"] = folder / "strong", "strong"
    kind, topk, views = cfg.KD.TEACHER.CACHE, cfg.KD.TEACHER.CACHE_TOPK, 1 if view else cfg.DATA.VIEWS
    return LogitCache(folder, kind, len(data.train), data.num_classes, epochs, identity, topk, views)


def fingerprint(dataset: Any) -> str:
    """Sixteen hex digits that identify a data set: its length, file names, labels and a few evenly spaced images."""
    sha = hashlib.sha256(str(len(dataset)).encode())
    for path, target in getattr(dataset, "samples", ()):
        sha.update(f"{Path(path).parent.name}/{Path(path).name} {target}\n".encode())
    transform, dataset.transform = dataset.transform, None
    for index in range(0, len(dataset), max(len(dataset) // 16, 1)):
        image, target = dataset[index]
        sha.update(image.tobytes() + str(target).encode())
    dataset.transform = transform
    return sha.hexdigest()[:16]


def prepare_networks(cfg: CfgNode, task: DistillationTask) -> None:
    """Set the memory format, then the moving average (which copies it), then torch.compile."""
    if cfg.MODEL.CHANNELS_LAST:
        task.to(memory_format=torch.channels_last)
    if cfg.SOLVER.EMA.ENABLED:
        task.setup_ema(decay=cfg.SOLVER.EMA.DECAY, use_warmup=cfg.SOLVER.EMA.WARMUP)
    if cfg.MODEL.COMPILE:
        task.compile()
    if cfg.KD.TEACHER.COMPILE and task.teacher is not None:
        task.teacher.compile()


def report_teacher(teacher: Teacher, loaders: Loaders, process: Process) -> None:
    """Log the teacher's accuracy on the validation images, with the preprocessing of training.

    As it was loaded, and also in KD.TEACHER.DTYPE where that is another dtype.
    """
    forms = {"teacher": teacher.plain}
    if teacher.speed.casts:
        forms[f"teacher in {teacher.speed.dtype_name}"] = teacher
    for name, predict in forms.items():
        found = evaluate(predict, loaders.val, process)
        logger.info("%s: top-1 %.2f  top-5 %.2f on %d images", name, found["top1"], found["top5"], found["images"])


def describe(
    cfg: CfgNode,
    written: dict[str, str],
    num_classes: int,
    stats: InputStats,
    iteration: int,
    max_iter: int,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """The metadata of a checkpoint: what the weights are, how they were trained, and their metrics.

    Args:
        written: `config` and `config_hash`, which are the same in every checkpoint of a training.
    """
    return {
        "method": method_name(cfg),
        "architecture": cfg.MODEL.NAME,
        "num_classes": num_classes,
        "data": cfg.DATA.NAME,
        "input": {"mean": list(stats.mean), "std": list(stats.std), "size": stats.size},
        **written,
        "iteration": iteration,
        "max_iter": max_iter,
        "finished": iteration == max_iter,
        "metrics": dict(metrics),
    }


def method_name(cfg: CfgNode) -> str:
    """The losses, and the optimizer where it is not SGD."""
    kd = cfg.KD
    losses = kd.LOSS.NAME if kd.FEATURE.NAME == "none" else f"{kd.LOSS.NAME} + {kd.FEATURE.NAME}"
    return losses if cfg.SOLVER.OPTIMIZER == "sgd" else f"{losses}, {cfg.SOLVER.OPTIMIZER}"
