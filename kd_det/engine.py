"""The trainer: detectron2's DefaultTrainer, made exact on resume and clear about what goes wrong."""

import logging
import weakref
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .checkpoint import WholeCheckpointer, load_all_weights
from .data.loader import TrainLoader, build_train_loader
from .evaluation import build_evaluator
from .hooks import KeepBest, SaveStudentConfig, SeedEachStep, cut_metrics
from .meta_arch import DistilledRCNN
from .serialization import factors, load_factors
from .solver import build_optimizer, check_solver
from .stream_scalars import StreamScalars
from .stream_trainer import build_step
from .teacher_config import each_teacher, teacher_config

logger = logging.getLogger(__name__)


class DistillationTrainer(DefaultTrainer):
    """`DefaultTrainer` for a `DistilledRCNN`, or any detector.

    It adds: the teacher is built, and its errors shown, before training; `--resume` continues to the bit (weights,
    optimizer, schedules, random draws, position in the data) when SEED ≥ 0; checkpoints are whole or absent;
    `student.yaml` is written beside them; a loss that is not finite names the iteration and the terms.
    SOLVER.OPTIMIZER, AMP and ACCUMULATE_STEPS choose the step (`stream_trainer`).
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own would wrap the model for CUDA, and start the loader at iteration 0.
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        check_solver(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        if isinstance(model, DistilledRCNN):
            model.load_teacher()
        optimizer = self.build_optimizer(cfg, model)
        self.loader = self.build_train_loader(cfg)
        self._trainer = build_step(cfg, distribute(model), self.loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase]:
        """DefaultTrainer's hooks, and ours: the best checkpoint follows the evaluation, the others come first."""
        seeding = [SeedEachStep(self.cfg.SEED)] if self.cfg.SEED >= 0 else []
        return [*seeding, SaveStudentConfig(self.cfg), StreamScalars(), *super().build_hooks(), KeepBest(self.cfg)]

    def resume_or_load(self, resume: bool = True) -> None:
        """As DefaultTrainer's; data and log, too, are taken up where the checkpoint was written."""
        super().resume_or_load(resume=resume)
        self.loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS
        if comm.is_main_process():
            cut_metrics(Path(self.cfg.OUTPUT_DIR, "metrics.json"), self.start_iter)

    def train(self) -> dict[str, Any] | None:
        """Run the training; returns the last evaluation's results."""
        model = self.checkpointer.model
        if self.cfg.KD.TEACHER.EVALUATE and self.start_iter == 0 and isinstance(model, DistilledRCNN):
            self.evaluate_teachers(model)
        super().train()
        return getattr(self, "_last_eval_results", None)

    @classmethod
    def evaluate_only(cls, cfg: CfgNode, resume: bool = False) -> dict[str, Any]:
        """AP on DATASETS.TEST of MODEL.WEIGHTS, or with `resume` of OUTPUT_DIR's last checkpoint; needs no teacher."""
        model = cls.build_model(cfg)
        last = WholeCheckpointer(model, cfg.OUTPUT_DIR)
        if resume and not last.has_checkpoint():
            raise ValueError(f"--eval-only --resume: there is no checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}")
        if not resume and not cfg.MODEL.WEIGHTS:
            raise ValueError("--eval-only: MODEL.WEIGHTS is empty, so there is nothing to evaluate; give a checkpoint")
        load_all_weights(model, last.get_checkpoint_file() if resume else cfg.MODEL.WEIGHTS, "MODEL.WEIGHTS")
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
            raise FloatingPointError(self.describe_failure(error)) from error

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
        """Raises ValueError where the state is that of another optimizer."""
        saved, ours = state_dict.get("optimizer_name", "sgd"), self.cfg.SOLVER.OPTIMIZER
        if saved != ours:
            raise ValueError(
                f"The checkpoint to resume was trained with SOLVER.OPTIMIZER {saved}, but this config says {ours}: "
                "resume with the same, or give its weights as MODEL.WEIGHTS to a training in another OUTPUT_DIR"
            )
        if state_dict.get("max_iter", self.max_iter) != self.max_iter:
            raise ValueError(
                f"The checkpoint to resume is of a training of {state_dict['max_iter']} iterations, but "
                f"SOLVER.MAX_ITER is {self.max_iter}: that is another schedule. Resume with the same, or start anew "
                "from its weights"
            )
        TrainerBase.load_state_dict(self, state_dict)
        self._trainer.load_state_dict(state_dict["_trainer"])
        if "aekt_factors" in state_dict:
            load_factors(self.checkpointer.model, state_dict["aekt_factors"])

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
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)
