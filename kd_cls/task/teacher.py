"""The frozen teacher: its own architecture, weights and input statistics, on the same images as the student."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from fvcore.common.config import CfgNode
from timm.task import DistillationTeacher
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cls.checkpoint.checkpoint import LAST, URL, fetch, load_weights, read_metadata
from kd_cls.config import load_cfg
from kd_cls.data.statistics import InputStats, check_stats
from kd_cls.models.factory import check_size, create_network, own_size
from kd_cls.task.acceleration import FastTeacher, TeacherSpeed
from kd_cls.task.features import MapReader
from kd_cls.task.logit_cache import LogitCache
from kd_core.utils.errors import UserError

logger = logging.getLogger("kd_cls")


class Teacher(DistillationTeacher):
    """A network in eval mode without gradients, on images that were normalised for the student.

    The images x are renormalised with the teacher's statistics, x' = (x·σ_S + μ_S − μ_T) / σ_T, and resized to its
    input size (bilinear, antialiased). Both are skipped where they are equal.

    Args:
        model: the network.
        stats: its input statistics.
        student_stats: those that the images have been normalised with.
        caches: of its logits of each view; empty without a cache.
        speed: how it computes them. `model` stays as it was loaded; the logits come from a faster copy, made at the
            first forward and again after `.to()` or `load_state_dict()`.
    """

    def __init__(
        self,
        model: nn.Module,
        stats: InputStats,
        student_stats: InputStats,
        caches: Sequence[LogitCache] = (),
        speed: TeacherSpeed = TeacherSpeed(),  # noqa: B008  (immutable)
    ) -> None:
        super().__init__(model.eval().requires_grad_(False))
        self.stats, self.student_stats, self.caches = stats, student_stats, caches
        self.same_statistics = stats[:2] == student_stats[:2]
        self.speed, self.compile_options = speed, None
        self.fast: FastTeacher | None = None
        self.is_measured = not speed.casts
        for name, values in (
            ("mean_kd", stats.mean),
            ("std_kd", stats.std),
            ("student_mean", student_stats.mean),
            ("student_std", student_stats.std),
        ):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode: `task.train()` reaches every submodule."""
        return super().train(False)

    def compile(self, **options: Any) -> "Teacher":
        """torch.compile the network, falling back to eager; `options` are torch.compile's."""
        self.compile_options, self.fast = options, None
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """Images that were normalised for the student, as this network takes them."""
        if not self.same_statistics:  # timm's normalize_input would compare them on the device in every step
            images = (images * self.student_std + self.student_mean - self.mean_kd) / self.std_kd
        if images.shape[-1] != self.stats.size:
            images = F.interpolate(images, size=(self.stats.size,) * 2, mode="bilinear", antialias=True)
        return images

    @torch.no_grad()
    def plain(self, images: Tensor) -> Tensor:
        """Logits like `forward`, from the network as it was loaded."""
        return self.model(self.prepare(images))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) for images (N, 3, H, W) normalised for the student."""
        images = self.prepare(images)
        fast = self.accelerated(images)
        if not self.is_measured:
            self.is_measured = True
            return fast.forward_and_log_drift(images, self.model)
        return fast(images)

    @torch.no_grad()
    def with_maps(self, images: Tensor, reader: MapReader) -> tuple[Tensor, list[Tensor]]:
        """Logits like `forward`, and the feature maps that `reader` reads in the same pass."""
        if not self.is_measured:
            self(images)
        images = self.prepare(images)
        return self.accelerated(images).with_maps(images, reader)

    def accelerated(self, images: Tensor) -> FastTeacher:
        """The faster copy, made with the first images."""
        if self.fast is None:
            example = images[:2].clone(memory_format=torch.contiguous_format)
            self.fast = FastTeacher(self.model, self.speed, self.compile_options, example)
        return self.fast

    def _apply(self, *args: Any, **kwargs: Any) -> "Teacher":
        self.fast = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fast = None
        super()._load_from_state_dict(*args, **kwargs)

    def cached(self, images: Tensor, epoch: int, indices: Tensor, view: int = 0) -> Tensor:
        """Logits like `forward`, from the view's cache if it has all; `indices` (N,) are those in the data set."""
        if not self.caches:
            return self(images)
        logits = self.caches[view].read(epoch, indices)
        if logits is not None:
            return logits.to(images.device, non_blocking=True)
        logits = self(images)
        self.caches[view].write(epoch, indices, logits)
        return logits


def teacher_description(cfg: CfgNode) -> tuple[str, str, str, CfgNode | None]:
    """(timm name, keyword arguments, weights, the teacher's own config or None) of KD.TEACHER.

    Raises:
        UserError: neither or both of NAME and CONFIG_FILE.
    """
    node = cfg.KD.TEACHER
    if bool(node.NAME) == bool(node.CONFIG_FILE):
        raise UserError(
            f"KD.LOSS.NAME is {cfg.KD.LOSS.NAME!r} and KD.FEATURE.NAME {cfg.KD.FEATURE.NAME!r}, so there must be a "
            "teacher: set one of KD.TEACHER.CONFIG_FILE "
            f"(now {node.CONFIG_FILE!r}) and KD.TEACHER.NAME (now {node.NAME!r})"
        )
    if node.NAME:
        return node.NAME, node.KWARGS, node.WEIGHTS, None
    own = load_cfg(node.CONFIG_FILE)
    return own.MODEL.NAME, own.MODEL.KWARGS, node.WEIGHTS or str(Path(own.OUTPUT_DIR, LAST)), own


def build_teacher(
    cfg: CfgNode, num_classes: int, student_stats: InputStats, caches: Sequence[LogitCache] = ()
) -> Teacher:
    """The teacher of KD.TEACHER.

    Raises:
        UserError: no weights, a file that does not fit the network in every key, or other classes than the student's.
    """
    node = cfg.KD.TEACHER
    name, kwargs, weights, own = teacher_description(cfg)
    if weights.startswith(URL):
        weights = fetch(weights, "KD.TEACHER.WEIGHTS")
    metadata = read_metadata(weights) if weights else {}
    if metadata.get("num_classes", num_classes) != num_classes:
        raise UserError(
            f"KD.TEACHER.WEIGHTS: {weights} is a teacher of {metadata['num_classes']} classes, the student learns "
            f"{num_classes} ({cfg.DATA.NAME}): teacher and student must know the same classes"
        )
    if node.PRETRAINED:
        check_pretrained_classes(name, num_classes)
    model = create_network(name, num_classes, kwargs, node.PRETRAINED, "KD.TEACHER")
    if node.ALLOW_RANDOM and not Path(weights).is_file():
        logger.warning("KD.TEACHER.ALLOW_RANDOM: the teacher has random weights")
    elif weights:
        check_trained(weights, own is not None and not node.WEIGHTS, metadata, node.CONFIG_FILE)
        load_weights(model, weights, "KD.TEACHER.WEIGHTS")
    elif not node.PRETRAINED:
        raise UserError(
            "KD.TEACHER.WEIGHTS is empty: name the teacher's weights, or set KD.TEACHER.PRETRAINED True for timm's "
            "(KD.TEACHER.ALLOW_RANDOM True for tests)"
        )
    stats = teacher_stats(node, model, kwargs, own, metadata, student_stats)
    check_size(model, kwargs, stats.size, "KD.TEACHER", "KD.TEACHER.INPUT_SIZE")
    return Teacher(model, stats, student_stats, caches, TeacherSpeed.from_config(cfg))


def check_pretrained_classes(name: str, num_classes: int) -> None:
    """Refuse timm's weights for another number of classes: timm would add a random classifier."""
    found = getattr(timm.get_pretrained_cfg(name), "num_classes", num_classes)
    if found != num_classes:
        raise UserError(
            f"KD.TEACHER.PRETRAINED: timm's weights of {name} know {found} classes, the student learns {num_classes}: "
            "train the teacher on the student's data first, and name it in KD.TEACHER.CONFIG_FILE"
        )


def check_trained(weights: str, is_own: bool, metadata: dict[str, Any], config_file: str) -> None:
    """Refuse a teacher of CONFIG_FILE that has not been trained; warn of one whose training is incomplete."""
    if is_own and not Path(weights).is_file():
        raise UserError(
            f"KD.TEACHER.CONFIG_FILE: the teacher of {config_file} has not been trained, there is no {weights}: run "
            f"python -m kd_cls.train --config-file {config_file}, or name its weights in KD.TEACHER.WEIGHTS, or set "
            "KD.TEACHER.TRAIN_IF_MISSING True"
        )
    if not metadata.get("finished", True):
        logger.warning(
            "the teacher in %s has been trained for %s of %s iterations",
            weights,
            metadata["iteration"],
            metadata["max_iter"],
        )


def teacher_stats(
    node: CfgNode, model: nn.Module, kwargs: str, own: CfgNode | None, metadata: dict[str, Any], student: InputStats
) -> InputStats:
    """The teacher's input: from KD.TEACHER, else its checkpoint, else its config, else timm's `pretrained_cfg`.

    A network that takes any size gets the student's images unresized, unless one of those names a size.
    """
    written, timms = metadata.get("input", {}), model.pretrained_cfg
    mean = node.MEAN or written.get("mean") or (own and own.MODEL.MEAN) or timms["mean"]
    std = node.STD or written.get("std") or (own and own.MODEL.STD) or timms["std"]
    fixed = own_size(model, kwargs) if timms.get("fixed_input_size") else 0
    size = node.INPUT_SIZE or written.get("size") or (own and own.DATA.INPUT_SIZE) or fixed or student.size
    check_stats(mean, std, "KD.TEACHER")
    return InputStats(tuple(mean), tuple(std), size)
