"""`DistillationTrainer` over a LazyConfig: what tools/lazyconfig_train_net.py runs."""

import argparse
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim import Optimizer

from kd_core.utils.errors import UserError
from kd_core.utils.report.runs import lookup, method_title, with_common_keys
from kd_det.checkpoint.checkpointer import check_local_file
from kd_det.checkpoint.resume import check_same_config, config_file
from kd_det.checks import data_checks
from kd_det.config.lazy import (
    IGNORED_ON_RESUME,
    as_tree,
    engine_config,
    in_lazy_words,
    name_of,
    plain_model,
    write_lazy_student,
)
from kd_det.data.bad_images import check_on_bad_image
from kd_det.data.loader import TrainLoader, make_train_loader
from kd_det.engine.console import say
from kd_det.engine.launch import choose_device, prepare_output
from kd_det.engine.trainer import DistillationTrainer
from kd_det.evaluation.evaluator import BoxEvaluator
from kd_det.modeling.backbone.timm_backbone import TimmBackbone
from kd_det.modeling.teacher.lazy import build_lazy, config_path, load_lazy, select
from kd_det.solver import check_images, check_values, exempt_from_decay

logger = logging.getLogger(__name__)

# Arguments of `dataloader.train` that are read here.
LOADER = {"_target_", "dataset", "mapper", "sampler", "total_batch_size", "aspect_ratio_grouping", "num_workers"}


class LazyTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose model, optimizer, schedule, data and evaluator are built from a LazyConfig.

    `LazyTrainer.of(lazy)` is the class for one; its `cfg` is `engine_config(lazy)`.
    """

    lazy: DictConfig

    @classmethod
    def of(cls, lazy: DictConfig) -> "type[LazyTrainer]":
        """The trainer's class of a LazyConfig."""
        return type(cls.__name__, (cls,), {"lazy": lazy, "log_period": select(lazy, "train.log_period") or 20})

    @classmethod
    def check(cls, cfg: CfgNode, world_size: int) -> None:
        check_values(cfg.SOLVER)
        check_on_bad_image(cfg.DATASETS.BAD_IMAGES)
        check_images(cfg.SOLVER.IMS_PER_BATCH, world_size, cfg.SOLVER.ACCUMULATE_STEPS)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_lazy(cls.lazy, "--config-file").to(cfg.MODEL.DEVICE)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def build_plain_model(cls, cfg: CfgNode) -> nn.Module:
        return instantiate(plain_model(cls.lazy)).to(cfg.MODEL.DEVICE)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
        """`optimizer`, one of torch's or of `kd_core.optim`; its `params.model`, if it has one, is the student."""
        refuse_random_frozen(model, cfg.MODEL.WEIGHTS)
        node = deepcopy(cls.lazy.optimizer)
        if not OmegaConf.is_dict(node.get("params")):
            raise UserError("optimizer.params must be a call of detectron2's get_default_optimizer_params")
        node.params.model = model
        try:
            optimizer = instantiate(node)
        except (TypeError, ValueError) as error:
            raise UserError(f"optimizer cannot be built ({type(error).__name__}: {error})") from error
        exempt_from_decay(optimizer, getattr(model, "no_decay", ()))
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
        return LRMultiplier(optimizer, build_node(cls.lazy, "lr_multiplier"), cfg.SOLVER.MAX_ITER)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        """`dataloader.train`, a call of detectron2's build_detection_train_loader, with batches that resume exactly."""
        node = cls.lazy.dataloader.train
        if name_of(node.get("_target_")).rpartition(".")[2] != build_detection_train_loader.__name__:
            raise UserError("dataloader.train must be a call of detectron2's build_detection_train_loader")
        if unknown := set(node) - LOADER:
            known = ", ".join(sorted(LOADER - {"_target_"}))
            raise UserError(f"dataloader.train.{min(unknown)} is not read: its arguments are {known}")
        dicts = build_node(cls.lazy, "dataloader.train.dataset")
        sampler = build_node(cls.lazy, "dataloader.train.sampler") or TrainingSampler(len(dicts))
        if cfg.SEED >= 0:
            sampler._seed = cfg.SEED  # detectron2's samplers draw one otherwise, and a resumed run would draw another
        return make_train_loader(cfg, dicts, build_node(cls.lazy, "dataloader.train.mapper"), sampler)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """The results of `model` under `dataloader.evaluator` on `dataloader.test`; {} without an evaluator."""
        if "evaluator" not in cls.lazy.dataloader:
            return {}
        results = inference_on_dataset(model, build_node(cls.lazy, "dataloader.test"), cls.build_evaluator(cfg))
        if comm.is_main_process():
            print_csv_format(results)
        return results

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str = "") -> DatasetEvaluator:
        """`dataloader.evaluator`, whose data set it names itself."""
        lazy = deepcopy(cls.lazy)
        node = lazy.dataloader.evaluator
        if name_of(node.get("_target_")).rpartition(".")[2] == COCOEvaluator.__name__:
            node._target_ = BoxEvaluator  # it needs no compiled code
            node.output_dir = node.get("output_dir") or str(Path(cfg.OUTPUT_DIR, "inference"))
            node.pop("use_fast_impl", None)
        return build_node(lazy, "dataloader.evaluator")

    def describe(self) -> None:
        """Model, schedule and folder: the LazyConfig says what is trained."""
        parameters, solver = sum(p.numel() for p in self.student_parameters()), self.cfg.SOLVER
        config = with_common_keys(as_tree(self.lazy))
        say(
            {
                "method": method_title(config),
                "teacher": lookup(config, "KD", "TEACHER", "WEIGHTS") or "none",
                "student": f"{type(self.checkpointer.model).__name__}, {parameters / 1e6:.2f} M parameters",
                "data": f"{len(self.loader.dataset)} images",
                "schedule": f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, seed {self.cfg.SEED}",
                "device": f"{self.cfg.MODEL.DEVICE}, {comm.get_world_size()} process(es)",
                "folder": f"{self.cfg.OUTPUT_DIR} (log.txt has config, environment and model)",
            }
        )

    def build_student_writer(self) -> HookBase:
        def write(trainer: LazyTrainer) -> None:
            if comm.is_main_process():
                write_lazy_student(trainer.lazy, Path(trainer.cfg.OUTPUT_DIR, "student.yaml"))

        return hooks.CallbackHook(before_train=write)

    def build_hooks(self) -> list[HookBase | None]:
        """As `DistillationTrainer`'s; `train.checkpointer.max_to_keep` is the number of periodic checkpoints kept."""
        found = super().build_hooks()
        for hook in found:
            if isinstance(hook, hooks.PeriodicCheckpointer):
                hook.max_to_keep = select(self.lazy, "train.checkpointer.max_to_keep")
        return found


def build_node(lazy: DictConfig, key: str) -> Any:
    """What the call under a dotted key makes; None where there is no such key.

    Raises:
        UserError: an argument that it does not take.
    """
    try:
        return instantiate(OmegaConf.select(lazy, key))
    except TypeError as error:
        raise UserError(f"{key} cannot be built ({type(error).__name__}: {error})") from error


def refuse_random_frozen(model: nn.Module, weights: str) -> None:
    """Raise a UserError where layers are frozen and no weights will be loaded: they would stay random."""
    timms = [module for module in model.modules() if isinstance(module, TimmBackbone) and module.pretrained]
    loaded = {p for module in timms for p in module.parameters()}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad and p not in loaded]
    if frozen and not weights:
        raise UserError(
            f"train.init_checkpoint is empty and {len(frozen)} weights of the model are frozen, the first is "
            f"{frozen[0]}: they would stay random. Name a checkpoint, or set e.g. model.backbone.bottom_up.freeze_at=0"
        )


def setup(args: argparse.Namespace) -> tuple[DictConfig, CfgNode]:
    """The LazyConfig of the command line and the engine's frozen config of it, checked; logging, seeds and the output
    folder made ready.

    Raises:
        UserError: what is wrong with the file, an override, a data set or the weights, before anything is built.
    """
    args.config_file = config_path(args.config_file, "--config-file")  # default_setup logs the file
    lazy = load_lazy(args.config_file, args.opts, "--config-file", "the command line:")
    cfg = engine_config(lazy)
    choose_device(cfg, args.num_gpus)
    cfg.freeze()
    for check in data_checks(cfg, ("TEST",) if args.eval_only else ("TRAIN", "TEST")):
        check.run()
    LazyTrainer.check(cfg, comm.get_world_size())
    tree, written = as_tree(lazy), config_file(cfg.OUTPUT_DIR)
    resumed = args.resume and not args.eval_only and Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file()
    if not args.resume:  # a checkpoint has the weights
        check_local_file("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    if resumed and written.is_file():
        check_same_config(written, tree, None, IGNORED_ON_RESUME, f"the run in train.output_dir {cfg.OUTPUT_DIR}")
    prepare_output(OmegaConf.create(tree), args, cfg.OUTPUT_DIR)
    return lazy, cfg


def main(args: argparse.Namespace) -> Any:
    """Train, or evaluate, as the command line says."""
    try:
        lazy, cfg = setup(args)
        trainer_class = LazyTrainer.of(lazy)
        if args.eval_only:
            return trainer_class.evaluate_only(cfg, resume=args.resume)
        if "evaluator" in lazy.dataloader:
            trainer_class.build_evaluator(cfg)  # before hours are spent, and not after them
        trainer = trainer_class(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    except UserError as error:
        raise type(error)(in_lazy_words(str(error))) from error
