"""The trainer: detectron2's DefaultTrainer, made exact on resume and clear about what goes wrong."""

import logging
import weakref
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import Optimizer

from kd_core.utils.errors import DivergedError, UserError
from kd_core.utils.files import cut_metrics
from kd_det.checkpoint.checkpointer import UnreadableFile, WholeCheckpointer, load_all_weights
from kd_det.checkpoint.resume import (
    check_begun,
    check_file,
    check_initial_weights,
    check_model,
    check_state,
    load_step,
    note_teachers_file,
    other_checkpoints,
)
from kd_det.checks import check_frozen_weights, check_synchronised_norms
from kd_det.data.loader import TrainLoader, build_train_loader
from kd_det.engine.hooks.checkpointing import KeepBest, SaveStudentConfig, SeedEachStep
from kd_det.engine.hooks.monitoring import StageTimes, StreamScalars
from kd_det.engine.hooks.moving_average import MovingAverage, UpdateAverage
from kd_det.engine.hooks.ranks import CheckRanksAgree, ShareBatchNorm
from kd_det.engine.train_step import build_step
from kd_det.engine.writers import build_wandb_writers
from kd_det.evaluation.evaluator import build_evaluator
from kd_det.modeling.aekt import factors, load_factors
from kd_det.modeling.meta_arch.rcnn import DistilledRCNN
from kd_det.modeling.teacher.build import each_teacher, teacher_config
from kd_det.solver import build_optimizer, check_solver, scale_to_world_size

logger = logging.getLogger(__name__)

# Every rank keeps BatchNorm statistics of its own, until `ShareBatchNorm`; newer versions of torch have another word.
WORDS = signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in WORDS else "broadcast_buffers": False}


class DistillationTrainer(DefaultTrainer):
    """`DefaultTrainer` for a `DistilledRCNN`, or any detector.

    It adds: the teacher is built, and its errors shown, before training; `--resume` continues to the bit (weights,
    optimizer, schedules, random draws, position in the data) when SEED ≥ 0; checkpoints are whole or absent;
    `student.yaml` is written beside them; a loss that is not finite names the iteration and the terms; SOLVER.EMA's
    average is evaluated and saved beside the student; several processes are seen to train the same network.
    SOLVER.OPTIMIZER, AMP and ACCUMULATE_STEPS choose the step (`stream_trainer`).
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own would wrap the model for CUDA, and start the loader at iteration 0.
        TrainerBase.__init__(self)
        cfg = scale_to_world_size(cfg, comm.get_world_size())
        check_solver(cfg, comm.get_world_size())
        check_synchronised_norms(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if isinstance(model, DistilledRCNN):
            model.load_teacher()
        optimizer = self.build_optimizer(cfg, model)
        self.loader = self.build_train_loader(cfg)
        self._trainer = build_step(cfg, distribute(model), self.loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.average = MovingAverage(cfg, model) if cfg.SOLVER.EMA.ENABLED else None
        saved = {"ema": self.average} if self.average else {}
        self.checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **saved)
        self.start_iter, self.resumed = 0, False
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's hooks and ours.

        Before any checkpoint and evaluation the average follows the student, and BatchNorm's statistics are shared;
        the average is evaluated beside the student, before the writers; the best checkpoint follows the evaluation.
        """
        solver, period = self.cfg.SOLVER, self.cfg.TEST.EVAL_PERIOD
        seeding = [SeedEachStep(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        inherited = super().build_hooks()
        saving = next(i for i, h in enumerate(inherited) if isinstance(h, hooks.PeriodicCheckpointer | hooks.EvalHook))
        evaluated = next(i for i, hook in enumerate(inherited) if isinstance(hook, hooks.EvalHook)) + 1
        student, output = self.checkpointer.model, Path(self.cfg.OUTPUT_DIR)
        averages = [self.average] if self.average else []
        return [
            *seeding,
            SaveStudentConfig(self.cfg),
            StreamScalars(),
            StageTimes(),
            *inherited[:saving],
            *(UpdateAverage(average) for average in averages),
            ShareBatchNorm([student, *(average.model for average in averages)], (solver.CHECKPOINT_PERIOD, period)),
            CheckRanksAgree(solver.CHECKPOINT_PERIOD),
            *inherited[saving:evaluated],
            *(hooks.EvalHook(period, self.evaluate_average) for _ in averages),
            *inherited[evaluated:],
            KeepBest(output / "model_best.pth", student),
            *(KeepBest(output / "model_best_ema.pth", average.model, "ema") for average in averages),
        ]

    def build_writers(self) -> list[EventWriter]:
        """detectron2's: console, metrics.json and TensorBoard; and Weights & Biases where WANDB.ENABLED asks for it."""
        return [*super().build_writers(), *build_wandb_writers(self.cfg)]

    def evaluate_average(self) -> dict[str, Any]:
        """AP of the moving average, under `ema`, which joins the student's results."""
        logger.info("Evaluating the moving average of the student (SOLVER.EMA)")
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(self.cfg.OUTPUT_DIR, "ema"))
        results = {"ema": self.test(cfg, self.average.model)}
        self._last_eval_results = {**self._last_eval_results, **results}
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; data and log, too, are taken up where the checkpoint was written.

        Raises:
            UserError: the checkpoint, or MODEL.WEIGHTS, is of something else (`resume.py`).
        """
        resume = resume and self.checkpointer.has_checkpoint()
        path = self.checkpointer.get_checkpoint_file() if resume else self.cfg.MODEL.WEIGHTS
        if resume:
            check_file(path)
        try:
            super().resume_or_load(resume=resume)
        except UnreadableFile as error:
            raise UserError(f"{error}; {other_checkpoints(path)}" if resume else f"MODEL.WEIGHTS: {error}") from error
        if resume:
            check_begun(path, self.resumed)
        elif path:
            note_teachers_file(self.cfg)
            check_initial_weights(path, self.checkpointer.incompatible, self.checkpointer.model)
            check_frozen_weights(self.checkpointer.model, self.checkpointer.incompatible, path)
        self.loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS
        if comm.is_main_process():
            cut_metrics(Path(self.cfg.OUTPUT_DIR, "metrics.json"), last=self.start_iter - 1)

    def train(self) -> dict[str, Any] | None:
        """Run the training; returns the last evaluation's results."""
        model = self.checkpointer.model
        if self.cfg.KD.TEACHER.EVALUATE and self.start_iter == 0 and isinstance(model, DistilledRCNN):
            self.evaluate_teachers(model)
        self.write_final()
        super().train()
        return getattr(self, "_last_eval_results", None)

    def write_final(self) -> None:
        """Write `model_final.pth` where a training was killed between its last periodic checkpoint and that one."""
        if self.start_iter >= self.max_iter and Path(self.checkpointer.get_checkpoint_file()).name != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.iter)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """detectron2's model, in the layout that KD.CHANNELS_LAST asks for before DistributedDataParallel sees it."""
        model = super().build_model(cfg)
        if cfg.KD.CHANNELS_LAST:
            convert_conv2d_weight_memory_format(model, torch.channels_last)
        return model

    @classmethod
    def evaluate_only(cls, cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
        """AP on DATASETS.TEST of MODEL.WEIGHTS, or with `resume` of OUTPUT_DIR's last checkpoint; needs no teacher."""
        if resume:
            last = WholeCheckpointer(nn.Identity(), cfg.OUTPUT_DIR)
            if not last.has_checkpoint():
                raise UserError(f"--eval-only --resume: there is no checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}")
            cfg = cfg.clone()
            cfg.defrost()
            cfg.MODEL.WEIGHTS = last.get_checkpoint_file()  # named before the model is built: it fetches no other
        if not cfg.MODEL.WEIGHTS:
            raise UserError("--eval-only: MODEL.WEIGHTS is empty, so there is nothing to evaluate; give a checkpoint")
        model = cls.build_model(cfg)
        load_all_weights(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        results = cls.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    def evaluate_teachers(self, model: DistilledRCNN) -> None:
        """Log every teacher's AP on the student's test sets, under the teacher's own input settings."""
        for index, (named, teacher) in enumerate(zip(each_teacher(self.cfg), model.teachers, strict=False)):
            cfg = teacher_config(named)
            folder = f"teacher{index}" if self.cfg.KD.TEACHERS else "teacher"
            cfg.DATASETS.TEST, cfg.OUTPUT_DIR = self.cfg.DATASETS.TEST, str(Path(self.cfg.OUTPUT_DIR, folder))
            logger.info("Evaluating the teacher (KD.TEACHER.EVALUATE): %s", named.KD.TEACHER.CONFIG_FILE)
            self.test(cfg, teacher.model)

    def run_step(self) -> None:
        """One iteration; errors of the numbers say where training stood."""
        try:
            super().run_step()
        except FloatingPointError as error:
            raise DivergedError(self.describe_failure(error)) from error

    def describe_failure(self, error: FloatingPointError) -> str:
        """Iteration, learning rate, the last logged terms and the way back."""
        terms = {k: round(v[0], 4) for k, v in self.storage.latest().items() if "loss" in k}
        last = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else "none written yet"
        return (
            f"Training stopped at iteration {self.iter}, learning rate {self.optimizer_lr:g}: {error}\n"
            f"Terms of the iteration before: {terms}\nLast checkpoint: {last}. Lower SOLVER.BASE_LR, lengthen the "
            "warm-up or clip gradients (SOLVER.CLIP_GRADIENTS), then run with --resume."
        )

    @property
    def optimizer_lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (schedules) and optimizer, under the names that detectron2's main branch uses."""
        state = {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}
        model = self.checkpointer.model
        if getattr(model, "serialization", None) is not None:  # `model` in the checkpoint has them merged
            state["aekt_factors"] = factors(model)
        return {**state, "optimizer_name": self.cfg.SOLVER.OPTIMIZER, "max_iter": self.max_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError where the state is that of another training; warns of settings that differ."""
        path = self.checkpointer.get_checkpoint_file()
        check_state(state_dict, self.cfg.SOLVER.OPTIMIZER, self.max_iter)
        check_model(self.checkpointer.incompatible, path)
        TrainerBase.load_state_dict(self, state_dict)
        load_step(self._trainer, state_dict["_trainer"], path)
        if "aekt_factors" in state_dict:
            load_factors(self.checkpointer.model, state_dict["aekt_factors"])
        self.resumed = True

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """A loader of micro-batches: IMS_PER_BATCH images are ACCUMULATE_STEPS of them, over all processes."""
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.IMS_PER_BATCH //= cfg.SOLVER.ACCUMULATE_STEPS
        return build_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def distribute(model: nn.Module) -> nn.Module:
    """DistributedDataParallel where there is more than one process, on CPU as on CUDA."""
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, **KEEP_BUFFERS)
