"""The counterpart of detectron2's `DefaultTrainer`: resumes exactly and explains what goes wrong."""

import logging
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, build_detection_test_loader
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.engine.defaults import default_writers
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format, verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kd_core.utils.errors import DivergedError, UserError
from kd_core.utils.files import cut_metrics
from kd_core.utils.run_info import EVALUATION, write_run_info
from kd_det.checkpoint.checkpointer import UnreadableFile, WholeCheckpointer, load_all_weights
from kd_det.checkpoint.resume import (
    check_begun,
    check_file,
    check_initial_weights,
    check_model,
    check_state,
    load_feature,
    load_step,
    note_teachers_file,
    other_checkpoints,
)
from kd_det.checks import check_frozen_weights, check_synchronised_norms
from kd_det.compat import deeplab_scheduler, distribute
from kd_det.config.student import plain_config
from kd_det.data.bad_images import NamedTestImages, TestLoader
from kd_det.data.loader import TrainLoader, build_train_loader
from kd_det.engine.console import describe, restore_console
from kd_det.engine.hooks.checkpointing import KeepBest, SaveStudentConfig, SeedEachStep
from kd_det.engine.hooks.evaluation import Evaluate
from kd_det.engine.hooks.health import WatchHealth
from kd_det.engine.hooks.monitoring import StageTimes, StreamScalars
from kd_det.engine.hooks.moving_average import MovingAverage, UpdateAverage
from kd_det.engine.hooks.ranks import CheckRanksAgree, ShareBatchNorm
from kd_det.engine.hooks.reporting import Report
from kd_det.engine.train_step import build_step
from kd_det.engine.writers import build_wandb_writers
from kd_det.evaluation.evaluator import build_evaluator
from kd_det.modeling.aekt import factors, load_factors
from kd_det.modeling.meta_arch.distilled import Distilled
from kd_det.modeling.teacher.build import each_teacher, teacher_config
from kd_det.solver import build_optimizer, check_solver, scale_to_world_size

logger = logging.getLogger(__name__)


class DistillationTrainer(TrainerBase):
    """Trains a `Distilled` model, or any of detectron2's, from a config; its methods have `DefaultTrainer`'s names.

    It adds to `DefaultTrainer`:

    - The teacher is built before training, so that its errors show early.
    - With SEED ≥ 0 a resumed training has the same weights, optimizer, schedules, random numbers and data, to the bit.
    - Checkpoints are whole or absent, and `student.yaml` is written beside them.
    - A loss that is not finite ends the training with its iteration and terms.
    - SOLVER.EMA's average is evaluated and saved beside the student.
    - Several processes are checked to have equal parameters.
    - SOLVER.OPTIMIZER, AMP and ACCUMULATE_STEPS choose the step (`train_step.build_step`).

    A subclass changes a part by overriding the `build_…` method that makes it.
    """

    log_period = 20

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        world_size = comm.get_world_size()
        self.cfg = cfg = scale_to_world_size(cfg, world_size)
        self.check(cfg, world_size)
        student = self.build_model(cfg)
        if isinstance(student, Distilled):
            student.load_teacher()
        optimizer = self.build_optimizer(cfg, student)
        self.loader = self.build_train_loader(per_micro_batch(cfg))
        check_loader(self.loader)
        self._trainer = build_step(cfg, distribute(student), self.loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        plain = partial(self.build_plain_model, cfg)
        self.average = MovingAverage(cfg, student, plain) if cfg.SOLVER.EMA.ENABLED else None
        self.checkpointer = self.build_checkpointer(student)
        self.max_iter, self.resumed = cfg.SOLVER.MAX_ITER, False
        self.register_hooks(self.build_hooks())

    @property
    def model(self) -> nn.Module:
        """The model of the step: the student, wrapped where there are several processes."""
        return self._trainer.model

    @property
    def optimizer(self) -> Optimizer:
        return self._trainer.optimizer

    @property
    def data_loader(self) -> TrainLoader:
        return self.loader

    def build_checkpointer(self, student: nn.Module) -> WholeCheckpointer:
        """Saves the student, the trainer's state, and the moving average where there is one."""
        averages = {"ema": self.average} if self.average else {}
        return WholeCheckpointer(student, self.cfg.OUTPUT_DIR, trainer=weakref.proxy(self), **averages)

    def build_hooks(self) -> list[HookBase | None]:
        """detectron2's hooks and ours, in the order in which they run after a step.

        Before a checkpoint and an evaluation, the average follows the student and BatchNorm's statistics are shared.
        The writers come after both evaluations, and the best weights are kept last.
        """
        cfg, student, output = self.cfg, self.checkpointer.model, Path(self.cfg.OUTPUT_DIR)
        save_period, eval_period = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
        main, average = comm.is_main_process(), self.average
        evaluated = [student, average.model] if average else [student]
        return [
            SeedEachStep(cfg.SEED) if cfg.SEED >= 0 else None,
            self.build_student_writer(),
            StreamScalars(),
            StageTimes(),
            WatchHealth(student, start=cfg.SOLVER.WARMUP_ITERS),
            hooks.IterationTimer(),
            hooks.LRScheduler(self.optimizer, self.scheduler),
            self.build_precise_bn(),
            UpdateAverage(average) if average else None,
            ShareBatchNorm(evaluated, (save_period, eval_period)),
            CheckRanksAgree(save_period),
            hooks.PeriodicCheckpointer(self.checkpointer, save_period) if main else None,
            Evaluate(eval_period, self.evaluate_student, output / "metrics.json"),
            Evaluate(eval_period, self.evaluate_average, output / "metrics.json", "ema/") if average else None,
            Report(cfg, self.build_writers(), self.log_period) if main else None,
            KeepBest(output / "model_best.pth", student),
            KeepBest(output / "model_best_ema.pth", average.model, "ema") if average else None,
        ]

    def build_student_writer(self) -> HookBase:
        """Writes `student.yaml`, with which plain detectron2 builds the student."""
        return SaveStudentConfig(self.cfg)

    def build_precise_bn(self) -> HookBase | None:
        """TEST.PRECISE_BN: recomputes BatchNorm's statistics before an evaluation, from a loader of its own."""
        if not self.cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = per_micro_batch(self.cfg)
        cfg.DATALOADER.NUM_WORKERS = 0
        iterations = cfg.TEST.PRECISE_BN.NUM_ITER
        return hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, self.model, self.build_train_loader(cfg), iterations)

    def build_writers(self) -> list[EventWriter]:
        """detectron2's: console, metrics.json and TensorBoard; and Weights & Biases where WANDB.ENABLED asks for it."""
        ours = build_wandb_writers(self.cfg, lambda: self.start_iter)
        return [*default_writers(self.cfg.OUTPUT_DIR, self.max_iter), *ours]

    def evaluate_student(self) -> dict[str, Any]:
        """The student's results on DATASETS.TEST."""
        self._last_eval_results = self.test(self.cfg, self.model)
        return self._last_eval_results

    def evaluate_average(self) -> dict[str, Any]:
        """The results of the moving average; they join the student's under the key `ema`."""
        logger.info("Evaluating the moving average of the student (SOLVER.EMA)")
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(self.cfg.OUTPUT_DIR, "ema"))
        results = {"ema": self.test(cfg, self.average.model)}
        self._last_eval_results = {**getattr(self, "_last_eval_results", {}), **results}
        return results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint in OUTPUT_DIR, where `resume` asks for it and there is one, else MODEL.WEIGHTS.

        On resuming, the data and the log continue from that iteration, too.

        Raises:
            UserError: the checkpoint, or MODEL.WEIGHTS, does not fit this training (`checkpoint/resume.py`).
        """
        resume = resume and self.checkpointer.has_checkpoint()
        path = self.checkpointer.get_checkpoint_file() if resume else self.cfg.MODEL.WEIGHTS
        if resume:
            check_file(path)
        try:
            self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        except UnreadableFile as error:
            raise UserError(f"{error}; {other_checkpoints(path)}" if resume else f"MODEL.WEIGHTS: {error}") from error
        if resume:
            check_begun(path, self.resumed)
            self.start_iter = self.iter + 1  # a checkpoint holds the iteration that it was written after
        elif path:
            note_teachers_file(self.cfg)
            check_initial_weights(path, self.checkpointer.incompatible, self.checkpointer.model)
            check_frozen_weights(self.checkpointer.model, self.checkpointer.incompatible, path)
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise UserError(
                f"the processes start at the iterations {starts}: they see other checkpoints in OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR}, which must be on a file system that every machine shares"
            )
        self.loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS
        if comm.is_main_process():
            cut_metrics(Path(self.cfg.OUTPUT_DIR, "metrics.json"), last=self.start_iter - 1)

    def train(self) -> dict[str, Any] | None:
        """Run the training; returns the last evaluation's results."""
        model = self.checkpointer.model
        if self.cfg.KD.TEACHER.EVALUATE and self.start_iter == 0 and isinstance(model, Distilled):
            self.evaluate_teachers(model)
        self.write_final()
        self.describe()
        restore_console()
        super().train(self.start_iter, self.max_iter)
        results = getattr(self, "_last_eval_results", None)
        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, results)
        return results

    def describe(self) -> None:
        """Tell the console what is trained, in a few lines."""
        parameters = self.student_parameters()
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        images = len(self.loader.dataset)
        describe(self.cfg, sum(p.numel() for p in parameters), trained, images, self.start_iter)

    def student_parameters(self) -> list[nn.Parameter]:
        """Those of the student's file."""
        return student_parameters(self.checkpointer.model)

    def write_final(self) -> None:
        """Write `model_final.pth` where a training was killed after its last periodic checkpoint."""
        if self.start_iter >= self.max_iter and Path(self.checkpointer.get_checkpoint_file()).name != "model_final.pth":
            self.checkpointer.save("model_final", iteration=self.iter)

    @classmethod
    def check(cls, cfg: CfgNode, world_size: int) -> None:
        """Refuse settings that this number of processes cannot train with, before anything is built."""
        check_solver(cfg, world_size)
        check_synchronised_norms(cfg, world_size)

    @classmethod
    def build_plain_model(cls, cfg: CfgNode) -> nn.Module:
        """The student as detectron2's own detector, without a teacher: the moving average's."""
        return build_model(plain_config(cfg))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """detectron2's model, in channels-last memory format where KD.CHANNELS_LAST asks for it."""
        model = build_model(cfg)
        logger.info("Model:\n%s", model)
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
            cfg.MODEL.WEIGHTS = last.get_checkpoint_file()  # before the model is built: it loads no other weights
        if not cfg.MODEL.WEIGHTS:
            raise UserError("--eval-only: MODEL.WEIGHTS is empty, so there is nothing to evaluate; give a checkpoint")
        model = cls.build_model(cfg)
        restore_console()
        load_all_weights(model, cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
        results = cls.test(apart_from_training(cfg), model)
        if comm.is_main_process():
            facts = {"parameters": sum(p.numel() for p in student_parameters(model)), "seed": cfg.SEED}
            flat = flatten_results_dict(results)
            write_run_info(cfg.OUTPUT_DIR, 0, EVALUATION, evaluated=cfg.MODEL.WEIGHTS, results=flat, **facts)
            verify_results(cfg, results)
        return results

    def evaluate_teachers(self, model: Distilled) -> None:
        """Log every teacher's AP on the student's test sets, under the teacher's own input settings."""
        for index, (named, teacher) in enumerate(zip(each_teacher(self.cfg), model.teachers, strict=False)):
            cfg = teacher_config(named)
            folder = f"teacher{index}" if self.cfg.KD.TEACHERS else "teacher"
            cfg.DATASETS.TEST, cfg.OUTPUT_DIR = self.cfg.DATASETS.TEST, str(Path(self.cfg.OUTPUT_DIR, folder))
            logger.info("Evaluating the teacher (KD.TEACHER.EVALUATE): %s", named.KD.TEACHER.CONFIG_FILE)
            self.test(cfg, teacher.model)

    def run_step(self) -> None:
        """One iteration; a loss that is not finite raises a DivergedError that says where."""
        self._trainer.iter = self.iter
        # TorchScript compiles a function after its first calls, and then rounds otherwise: with a RetinaNet's focal
        # loss, which detectron2 scripts, a resumed training would differ from an uninterrupted one.
        repeatable = torch.jit.optimized_execution(False) if self.cfg.SEED >= 0 else nullcontext()
        try:
            with repeatable:
                self._trainer.run_step()
        except FloatingPointError as error:
            raise DivergedError(self.describe_failure(error)) from error

    def describe_failure(self, error: FloatingPointError) -> str:
        """Iteration, learning rate, the last logged terms, and how to start again."""
        terms = {k: round(v[0], 4) for k, v in self.storage.latest().items() if "loss" in k}
        last = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else ""
        weights = f" and MODEL.WEIGHTS {last}" if last else ""
        return (
            f"Training stopped at iteration {self.iter}, learning rate {self.optimizer_lr:g}: {error}\n"
            f"Terms of the iteration before: {terms}\nLast checkpoint: {last or 'none written yet'}. Start anew, "
            f"with another OUTPUT_DIR{weights}: lower SOLVER.BASE_LR, lengthen the warm-up or clip gradients "
            "(SOLVER.CLIP_GRADIENTS)."
        )

    @property
    def optimizer_lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks (schedules) and optimizer, under the keys of detectron2's main branch."""
        state = {**super().state_dict(), "_trainer": self._trainer.state_dict()}
        model = self.checkpointer.model
        if getattr(model, "serialization", None) is not None:  # `model` in the checkpoint has them merged
            state["aekt_factors"] = factors(model)
        if hasattr(model, "loss_normalizer"):  # a RetinaNet's moving average, which is no buffer
            state["loss_normalizer"] = float(model.loss_normalizer)
        if getattr(model, "feature", None) is not None:
            state["feature_loss"] = model.feature.state_dict()
        return {**state, "optimizer_name": self.cfg.SOLVER.OPTIMIZER, "max_iter": self.max_iter}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError where the state is of another training; warns of settings that differ."""
        path = self.checkpointer.get_checkpoint_file()
        check_state(state_dict, self.cfg.SOLVER.OPTIMIZER, self.max_iter)
        check_model(self.checkpointer.incompatible, path)
        super().load_state_dict(state_dict)
        load_step(self._trainer, state_dict["_trainer"], path)
        if "aekt_factors" in state_dict:
            load_factors(self.checkpointer.model, state_dict["aekt_factors"])
        if "loss_normalizer" in state_dict:
            self.checkpointer.model.loss_normalizer = state_dict["loss_normalizer"]
        load_feature(self.checkpointer.model, state_dict, path)
        self.resumed = True

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """The loader of a config whose IMS_PER_BATCH is that of a micro-batch (`per_micro_batch`), over all processes.

        An override with a mapper of its own returns `kd_det.data.loader.build_train_loader(cfg, mapper)`.
        """
        return build_train_loader(cfg)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRScheduler:
        build = deeplab_scheduler() if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupPolyLR" else build_lr_scheduler
        try:
            return build(cfg, optimizer)
        except ValueError as error:  # an unknown name, or steps that do not ascend
            raise UserError(
                f"SOLVER.LR_SCHEDULER_NAME {cfg.SOLVER.LR_SCHEDULER_NAME}, STEPS {cfg.SOLVER.STEPS}, MAX_ITER "
                f"{cfg.SOLVER.MAX_ITER}, WARMUP_METHOD {cfg.SOLVER.WARMUP_METHOD}: {error}"
            ) from error

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> TestLoader:
        mapper = NamedTestImages(DatasetMapper(cfg, is_train=False))
        return TestLoader(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """The results of `model` on DATASETS.TEST, per data set if there are several; only on rank 0."""
        results = {}
        for name in cfg.DATASETS.TEST:
            loader, evaluator = cls.build_test_loader(cfg, name), cls.build_evaluator(cfg, name)
            results[name] = inference_on_dataset(model, loader, evaluator)
            if comm.is_main_process():
                logger.info("Results on %s:", name)
                print_csv_format(results[name])
        return next(iter(results.values())) if len(results) == 1 else results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def student_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of the student's file: a feature loss and AEKT's layers train beside them."""
    saved = model.state_dict().keys()
    return [p for name, p in model.named_parameters() if name in saved]


def per_micro_batch(cfg: CfgNode) -> CfgNode:
    """A copy whose IMS_PER_BATCH is that of one of the ACCUMULATE_STEPS micro-batches of a step."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH //= cfg.SOLVER.ACCUMULATE_STEPS
    return cfg


def check_loader(loader: Any) -> None:
    """Raise a UserError for a loader that cannot start where a training resumes."""
    if not hasattr(loader, "start"):
        raise UserError(
            f"build_train_loader returned a {type(loader).__name__}, which cannot start at a given batch, as --resume "
            "needs: return kd_det.data.loader.build_train_loader(cfg, mapper)"
        )


def apart_from_training(cfg: CfgNode) -> CfgNode:
    """`cfg`, or a copy that writes into OUTPUT_DIR/evaluation where OUTPUT_DIR holds a training.

    A report takes the detections in OUTPUT_DIR for the training's.
    """
    if not Path(cfg.OUTPUT_DIR, "metrics.json").is_file():
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "evaluation"))
    return cfg
