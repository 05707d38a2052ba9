"""The training loop: step, log, evaluate, save, and resume at any iteration to the bit.

Nothing keeps a counter of its own: order, augmentation, random numbers, learning rate, warm-up, top-k and the decay of
the moving average are functions of (SEED, iteration). So --resume needs only weights, optimizer and scaler.
"""

import logging
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import distribute_bn
from torch import Tensor
from torch.optim import Optimizer

from kd_cls.checkpoint.checkpoint import BEST, LAST, save_checkpoint
from kd_cls.checkpoint.resume import check_resumable, check_same_data
from kd_cls.checks import mixes
from kd_cls.data import Loaders, set_epoch
from kd_cls.distributed import Process, seed_step
from kd_cls.engine.cuda_graph import GraphedStep
from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.meters import StepMeters
from kd_cls.engine.writers import Writers
from kd_cls.task.distillation import DistillationTask
from kd_core.optim.gsnr import AutoMomenta
from kd_core.train_step import TrainStep, clip_gradients
from kd_core.utils.report.curves import MAP_CLASSES
from kd_core.utils.report.live import logged, status_line, write_live_report
from kd_core.utils.run_info import add_run_info, write_run_info

logger = logging.getLogger("kd_cls")


class Trainer:
    """Trains a task; `run` trains from `iteration` to the end.

    Args:
        cfg: the run's config; SOLVER.EPOCHS and the loader say how many iterations there are.
        task: student, teacher, losses; its moving average where SOLVER.EMA asks for one.
        loaders: of both splits.
        optimizer, scheduler: over the task's trainable module.
        process: this process among all.
        auto_momenta: sets the optimizer's momenta from what it measures; None for fixed ones.
        describe: (iteration, max_iter, metrics) → the metadata of a checkpoint.
    """

    def __init__(
        self,
        cfg: CfgNode,
        task: DistillationTask,
        loaders: Loaders,
        optimizer: Optimizer,
        scheduler: Scheduler,
        process: Process,
        describe: Callable[[int, int, dict[str, float]], dict[str, Any]],
        auto_momenta: AutoMomenta | None = None,
    ) -> None:
        self.cfg, self.task, self.loaders, self.process, self.describe = cfg, task, loaders, process, describe
        self.optimizer, self.scheduler, self.auto_momenta = optimizer, scheduler, auto_momenta
        clips = cfg.SOLVER.CLIP_GRADIENTS
        clip = partial(clip_gradients, optimizer, clips.CLIP_VALUE) if clips.ENABLED else None
        self.train_step = TrainStep(optimizer, task.amp_dtype, clip, auto_momenta)
        self.scaler = self.train_step.scaler
        self.steps_per_epoch = loaders.train.sampler.num_batches
        self.max_iter = max(round(cfg.SOLVER.EPOCHS * self.steps_per_epoch), 1)
        self.iteration, self.metrics, self.best = 0, {}, -1.0
        self.evaluated = True  # False from the save before an evaluation until it is done
        self.seconds = 0.0  # of training, over all resumes, up to the last checkpoint
        self.meters = StepMeters(list(task.streams), process.device)
        self.mixup = build_mixup(cfg, task.trainable_module.model.num_classes)
        self.memory_format = torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.contiguous_format
        self.output = Path(cfg.OUTPUT_DIR)
        batch_size = loaders.train.sampler.batch_size
        self.graph = GraphedStep(self.run_step, task, optimizer, batch_size) if cfg.SOLVER.CUDA_GRAPH else None

    def run(self) -> dict[str, float]:
        """Train to the end; returns the last evaluation's metrics, the best top-1 and the seconds it took."""
        self.writers = Writers(self.cfg, self.iteration, self.max_iter, self.process.is_main)
        self.started = time.perf_counter() - self.seconds
        try:
            self.note_start()
            self.meters.restart()
            if not self.evaluated:  # a kill, or a broken image, ended the evaluation
                self.evaluate()
                self.save(LAST, resumable=True)
            while self.iteration < self.max_iter:
                self.train_epoch(*divmod(self.iteration, self.steps_per_epoch))
        finally:
            self.writers.close()
            self.report(running=False)
        return self.metrics | {"best_top1": self.best, "seconds": self.seconds}

    def train_epoch(self, epoch: int, start: int) -> None:
        """The batches of `epoch` from number `start` on, up to the end of the training."""
        self.task.train()
        sampler = self.loaders.train.sampler
        set_epoch(self.loaders.train, epoch, start)
        order = sampler.order(epoch)[start * sampler.batch_size :].split(sampler.batch_size)
        batches = zip(self.loaders.train, order, strict=True)
        for (images, target), indices in islice(batches, self.max_iter - self.iteration):
            self.step(images, target, epoch, indices)
            self.after_step()

    def step(self, images: Tensor, target: Tensor, epoch: int, indices: Tensor) -> None:
        """One iteration on a batch."""
        seed_step(self.cfg.SEED, self.process.rank, self.iteration)
        images = images.contiguous(memory_format=self.memory_format)
        if self.graph is None or len(images) < self.graph.batch_size:
            self.run_step(images, target, self.iteration + 1, None, epoch, indices)
        else:
            self.graph.step(images, target, self.iteration, self.progress)
        self.advance()

    def run_step(
        self,
        images: Tensor,
        target: Tensor,
        number: int | Tensor,
        warmup_weight: Tensor | None,
        epoch: int = 0,
        indices: Tensor | None = None,
    ) -> None:
        """From the batch to the updated weights, in SOLVER.ACCUMULATE_STEPS micro-batches.

        In a CUDA graph the step's number (from 1) and the loss's warm-up are tensors, and there is no teacher's cache
        to look up `indices` (the images' places in the data set) in.
        """
        if self.mixup is not None:
            images, target = self.mixup(images, target)
        steps = self.cfg.SOLVER.ACCUMULATE_STEPS
        least = min(self.loaders.train.sampler.batch_size // steps, 2)  # images: BatchNorm of a 1×1 map needs two
        parts = max(min(steps, len(images) // least), 1)
        columns = [tensor.tensor_split(parts) for tensor in (images, target, indices) if tensor is not None]

        def losses_of(part: tuple[Tensor, ...]) -> dict[str, Tensor]:
            images_part, target_part, *places = part
            teacher_logits = self.task.teacher_logits(images_part, epoch, *places) if places else None
            result = self.task(images_part, target_part, self.progress, teacher_logits, warmup_weight)
            labels = target_part.argmax(1) if target_part.ndim == 2 else target_part
            self.meters.update(result, result["output"], labels, number)
            if self.process.device.type == "cpu":  # reading values costs nothing there: stop before a NaN spreads
                self.meters.check(self.learning_rate)
            return self.task.stream_losses(result, len(images_part) / len(images))

        self.train_step.backward(list(zip(*columns, strict=True)), losses_of, self.iteration)
        self.train_step.optimizer_step()

    def advance(self) -> None:
        """Count the step; update the learning rate and the moving average."""
        self.iteration += 1
        self.scheduler.step_update(self.iteration)
        self.task.update_ema(self.iteration)

    def after_step(self) -> None:
        """Log, evaluate and save where it is due."""
        self.writers.advance()
        at_end = self.iteration == self.max_iter
        if self.iteration % self.cfg.LOG_PERIOD == 0 or at_end:
            self.log()
        epochs, rest = divmod(self.iteration, self.steps_per_epoch)
        evaluates = at_end or (rest == 0 and epochs % self.cfg.SOLVER.EVAL_PERIOD == 0)
        saves = at_end or self.iteration % (self.cfg.SOLVER.CHECKPOINT_PERIOD or self.steps_per_epoch) == 0
        if evaluates and saves:  # before it: an evaluation that fails must not cost an epoch of training
            self.evaluated = False
            self.save(LAST, resumable=True)
        if evaluates:
            self.evaluate()
        if saves:
            self.save(LAST, resumable=True)

    def note_start(self) -> None:
        """run.json, on the main process."""
        if self.process.is_main:
            facts = {"seed": self.cfg.SEED, "device": str(self.process.device), "world_size": self.process.world_size}
            parameters = sum(p.numel() for p in self.task.trainable_module.model.parameters())
            write_run_info(self.output, self.iteration, max_iter=self.max_iter, parameters=parameters, **facts)

    def report(self, running: bool) -> None:
        """report.html, where REPORT.ENABLED asks for it, and the status line, on the main process."""
        if not self.process.is_main:
            return
        # matplotlib is imported where a page is written
        from kd_cls.report import TOP1, classifier_page, read_classifier_run

        add_run_info(self.output, training_seconds=time.perf_counter() - self.started)
        if self.cfg.REPORT.ENABLED:
            write_live_report(self.output, read_classifier_run, partial(classifier_page, predictions=False), running)
        values = list(zip(*logged(self.output).series(TOP1), strict=True))
        logger.info(status_line(self.iteration, self.max_iter, "top-1", values))

    @property
    def progress(self) -> float:
        """iteration / max_iter."""
        return self.iteration / self.max_iter

    @property
    def learning_rate(self) -> float:
        """That of the first parameter group."""
        return self.optimizer.param_groups[0]["lr"]

    def log(self) -> None:
        """Read the meters (which waits for the GPU) and write them."""
        self.meters.check(self.learning_rate)
        metrics = self.meters.read(self.process.world_size)
        metrics |= {"lr": self.learning_rate, "epoch": self.iteration / self.steps_per_epoch}
        self.writers.log_progress(metrics | self.task.schedule(self.progress), self.iteration)

    def evaluate(self) -> None:
        """Evaluate the student, and its moving average beside it; keep the best."""
        self.meters.check(self.learning_rate)
        self.share_batchnorm()
        self.task.eval()
        how = self.loaders.val, self.process, self.task.amp_dtype
        confusions = self.new_confusions()
        metrics = evaluate(self.task.trainable_module.predict, *how, confusions)
        if self.task.has_ema():
            ema = evaluate(self.task.trainable_module_ema.module.predict, *how)
            metrics |= {f"ema_{name}": ema[name] for name in ("top1", "top5", "loss")}
        self.task.train()
        self.metrics = metrics
        self.writers.write({f"val/{name}": value for name, value in metrics.items()}, self.iteration)
        if confusions is not None:
            self.writers.draw_confusions(confusions.cpu().numpy(), self.iteration)
        logger.info(
            "evaluation after %d iterations: %s", self.iteration, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
        )
        top1 = metrics.get("ema_top1", metrics["top1"])
        if top1 > self.best:
            self.best = top1
            self.save(BEST, resumable=False)
        self.evaluated = True
        if self.iteration < self.max_iter:
            self.report(running=True)
        self.meters.restart()

    def new_confusions(self) -> Tensor | None:
        """(C, C) zeros for an evaluation to count in, where REPORT.ENABLED asks for pictures and they can be read."""
        classes = self.task.trainable_module.model.num_classes
        drawn = self.cfg.REPORT.ENABLED and classes <= MAP_CLASSES
        return torch.zeros(classes, classes, dtype=torch.long, device=self.process.device) if drawn else None

    def share_batchnorm(self) -> None:
        """Give every process the same BatchNorm statistics: each has seen its own images only."""
        how = self.cfg.SOLVER.DISTRIBUTE_BN
        if self.process.world_size > 1 and how:
            ema = self.task.get_trainable_module(ema=True)
            for module in filter(None, (self.task.trainable_module, ema, self.task.feature)):
                distribute_bn(module, self.process.world_size, reduce=how == "reduce")

    def save(self, name: str, resumable: bool) -> None:
        """Write a checkpoint on the main process."""
        self.meters.check(self.learning_rate)
        self.share_batchnorm()
        self.seconds = time.perf_counter() - self.started
        if not self.process.is_main:
            return
        state = self.task.weights(with_factors=resumable)
        state["metadata"] = self.describe(self.iteration, self.max_iter, self.metrics)
        state["metadata"]["finished"] &= self.evaluated or not resumable
        if resumable:
            state["training"] = self.state_dict()
        save_checkpoint(state, self.output / name)

    def state_dict(self) -> dict[str, Any]:
        """What `resume` needs, beside the weights, to continue to the bit."""
        return {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "best": self.best,
            "metrics": dict(self.metrics),
            "evaluated": self.evaluated,
            "scheduler": self.scheduler.state_dict(),
            **self.train_step.state_dict(),
        }

    def resume(self, checkpoint: dict[str, Any]) -> None:
        """Continue where a checkpoint of this run was taken.

        Raises:
            ValueError: it is of another run, or holds weights only.
        """
        check_resumable(checkpoint, self.cfg)
        check_same_data(checkpoint["metadata"], self.describe(self.iteration, self.max_iter, self.metrics))
        state = checkpoint["training"]
        self.iteration, self.best, self.metrics = state["iteration"], state["best"], state["metrics"]
        self.seconds, self.evaluated = state["seconds"], state.get("evaluated", True)
        self.task.load(checkpoint)
        self.train_step.load_state_dict(state)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.graph is not None:
            self.graph.forget()


def build_mixup(cfg: CfgNode, num_classes: int) -> Mixup | None:
    """timm's Mixup, or None where SOLVER.MIXUP mixes nothing."""
    if not mixes(cfg):
        return None
    mixup, smoothing = cfg.SOLVER.MIXUP, cfg.SOLVER.LABEL_SMOOTHING
    return Mixup(mixup.ALPHA, mixup.CUTMIX_ALPHA, None, mixup.PROB, label_smoothing=smoothing, num_classes=num_classes)
