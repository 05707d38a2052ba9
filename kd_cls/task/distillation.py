"""Classification and distillation as one of timm's training tasks."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from kd_cls.task.features import MapReader
from kd_cls.task.student import Student
from kd_cls.task.teacher import Teacher
from kd_core.losses import FeatureLoss
from kd_core.utils.compiling import CompiledOrPlain

logger = logging.getLogger("kd_cls")


class DistillationTask(TrainingTask):
    """loss = w_task · CE(task logits, target) + Σ terms(z, z_T, target, progress), in float32 under any autocast;
    with a feature loss, + Σ terms(student's maps, teacher's maps, progress), the mean over the views.

    timm's own loops can train it through `loss`, the sum. Our loop takes the gradient of each stream separately
    (`stream_losses`).

    Args:
        student: gives the distilled logits z, and the task logits (the same without a serialization layer).
        teacher: frozen; None for plain training.
        loss: a loss of kd_core.losses; None for plain training.
        criterion: of the task, on logits and target (class indices, or soft targets (N, C) of a mixed batch).
        task_weight: w_task.
        amp_dtype: of autocast around the networks; None leaves it off.
        device: of the task.
        views: of each image. Two, weak and strong, come as one image of six channels; each takes a forward pass of its
            own, so that BatchNorm sees one view at a time. CE is then the sum over both.
        at_once: put both views through one forward pass instead.
        feature: a loss between feature maps, whose parameters are trained too; None for none.
        readers: of the student's and the teacher's maps, with `feature`.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        loss: nn.Module | None,
        criterion: nn.Module,
        task_weight: float = 1.0,
        amp_dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        views: int = 1,
        at_once: bool = False,
        feature: FeatureLoss | None = None,
        readers: tuple[MapReader, MapReader] | None = None,
    ) -> None:
        super().__init__(device=device, verbose=False)
        self.trainable_module, self.teacher, self.criterion = student, teacher, criterion
        self.distillation, self.task_weight, self.amp_dtype = loss, task_weight, amp_dtype
        self.views, self.at_once, self.feature, self.readers = views, at_once, feature, readers
        self.streams = {"task": "tog"}
        for part in (loss, feature):
            self.streams |= part.streams if part is not None else {}
        self.compiled_student: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        self.to(self.device)

    def compile(self, backend: str = "inductor", mode: str | None = None, **options: Any) -> None:
        """torch.compile the training pass of the student; falls back to eager where that fails."""
        options |= {"backend": backend, "mode": mode}
        self.compiled_student = CompiledOrPlain(self.trainable_module, "student", log=logger, **options)

    def autocast(self) -> torch.autocast:
        """The autocast context of the networks."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        progress: float | None = None,
        teacher_logits: Tensor | tuple[Tensor, ...] | None = None,
        warmup_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss, output and terms of a batch.

        Args:
            input: images (N, 3, H, W), normalised for the student; two views of them are (N, 6, H, W).
            target: class indices (N,), or soft targets (N, C).
            progress: iteration / max_iter, for warm-up and top-k schedules; None: the end.
            teacher_logits: as `teacher_logits` returns them, if already computed.
            warmup_weight: the loss's warm-up at `progress` as a tensor, for a CUDA graph.
        Returns:
            `loss`, `output` (the task logits of the first view), and each weighted term: `task` and those of the
            distillation loss.
        """
        views = self.split_views(input)
        terms: dict[str, Tensor] = {}
        with self.autocast():
            if self.feature is not None:
                outputs, teacher_logits, terms = self.compare_features(views, progress)
            else:
                if self.teacher is not None and teacher_logits is None:
                    teacher_logits = self.one_or_both(self.each_view(self.teacher, views))
                outputs = self.each_view(self.compiled_student or self.trainable_module, views)
        logits = self.one_or_both([distilled for distilled, _ in outputs])
        task_losses = [self.criterion(task_logits.float(), target) for _, task_logits in outputs]
        terms = {"task": self.task_weight * sum(task_losses[1:], task_losses[0]), **terms}
        if self.distillation is not None:
            labels = target.argmax(1) if target.ndim == 2 else target
            graph_options = {} if warmup_weight is None else {"warmup_weight": warmup_weight}
            terms |= self.distillation(logits, teacher_logits, labels, progress, **graph_options)
        return {"loss": sum(terms.values()), "output": outputs[0][1], **terms}

    def compare_features(
        self, views: list[Tensor], progress: float | None
    ) -> tuple[list[tuple[Tensor, Tensor]], Tensor | tuple[Tensor, ...], dict[str, Tensor]]:
        """(both logits of the student, logits of the teacher, terms of the feature loss), of one pass of each a view.

        The maps of a view are free, but for what the backward pass needs, when the next view comes.
        """
        outputs, teacher_logits, terms = [], [], {}
        for view in views:
            logits, teacher_maps = self.teacher.with_maps(view, self.readers[1])
            teacher_logits.append(logits)
            *both, maps = self.trainable_module.with_maps(view, self.readers[0])
            outputs.append(tuple(both))
            for name, value in self.feature(maps, teacher_maps, progress).items():
                terms[name] = terms.get(name, 0) + value / len(views)
        return outputs, self.one_or_both(teacher_logits), terms

    def each_view(self, network: Callable[[Tensor], Any], views: list[Tensor]) -> list[Any]:
        """The outputs (a tensor, or a tuple of them) of a network for each view."""
        if not self.at_once:
            return [network(view) for view in views]
        found = network(torch.cat(views))
        if isinstance(found, Tensor):
            return list(found.chunk(len(views)))
        return list(zip(*(part.chunk(len(views)) for part in found), strict=True))

    def split_views(self, images: Tensor) -> list[Tensor]:
        """The views (N, 3, H, W) of a batch, in its memory format."""
        if self.views == 1:
            return [images]
        last = images.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        return [view.contiguous(memory_format=layout) for view in images.chunk(self.views, 1)]

    def one_or_both(self, of_views: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
        """The tensor of the only view, or the tuple of both, as the loss takes them."""
        return of_views[0] if self.views == 1 else tuple(of_views)

    def stream_losses(self, result: dict[str, Tensor], share: float = 1.0) -> dict[str, Tensor]:
        """The sum of each stream's terms, times `share`, the micro-batch's share of the batch."""
        losses: dict[str, Tensor] = {}
        for term, stream in self.streams.items():
            if term in result:
                losses[stream] = losses.get(stream, 0) + result[term] * share
        return losses

    def teacher_logits(self, images: Tensor, epoch: int, indices: Tensor) -> Tensor | tuple[Tensor, ...] | None:
        """The teacher's logits (N, C) of each view, from its cache if they are there.

        None without a teacher, and with a feature loss: `forward` computes them with the maps.

        Args:
            indices: (N,) of the images in the data set.
        """
        if self.teacher is None or self.feature is not None:
            return None
        with self.autocast():
            views = self.split_views(images)
            if self.at_once and not self.teacher.caches:
                return self.one_or_both(self.each_view(self.teacher, views))
            return self.one_or_both(
                [self.teacher.cached(images, epoch, indices, view) for view, images in enumerate(views)]
            )

    def schedule(self, progress: float) -> dict[str, float]:
        """Scheduled values at `progress`, for the log: K of the top-k mask."""
        topk = getattr(self.distillation, "topk", None)
        return {} if topk is None else {"K": topk.k(progress, self.trainable_module.model.num_classes)}

    def weights(self, with_factors: bool) -> dict[str, Any]:
        """Checkpoint entries: `model` and `model_ema` as plain timm loads them; for --resume (`with_factors`) also the
        `factors` merged into them, and the parameters of the `feature` loss.
        """
        students = {"model": self.trainable_module}
        if self.has_ema():
            students["model_ema"] = self.trainable_module_ema.module
        state: dict[str, Any] = {name: student.merged_state_dict() for name, student in students.items()}
        if with_factors:
            state["factors"] = {name: student.factors() for name, student in students.items()}
            if self.feature is not None:
                state["feature"] = self.feature.state_dict()
        return state

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Load the networks of a checkpoint of this run, factors and feature loss included."""
        if self.feature is not None:
            self.feature.load_state_dict(checkpoint["feature"])
        self.trainable_module.load(checkpoint["model"], checkpoint["factors"]["model"])
        if self.has_ema():
            self.trainable_module_ema.module.load(checkpoint["model_ema"], checkpoint["factors"]["model_ema"])
