"""A LazyConfig that trains: what the engine reads of it, how it is written down, and its student's file."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf, SCMode

from kd_core.utils.config import coerce, lookup, set_values
from kd_core.utils.errors import UserError, one_line
from kd_core.utils.files import write_text
from kd_det.config.defaults import kd_defaults
from kd_det.modeling.meta_arch.registry import distilled_architecture, plain_class
from kd_det.modeling.teacher.lazy import as_yacs, select

logger = logging.getLogger(__name__)

# The engine's key of the same meaning. kd_det/config/defaults.py says what it means, detectron2's documentation of its
# own. `train` of detectron2's common/train.py has those of the first group only.
KEYS = {
    "train.output_dir": "OUTPUT_DIR",
    "train.init_checkpoint": "MODEL.WEIGHTS",
    "train.max_iter": "SOLVER.MAX_ITER",
    "train.amp.enabled": "SOLVER.AMP.ENABLED",
    "train.checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "train.eval_period": "TEST.EVAL_PERIOD",
    "train.device": "MODEL.DEVICE",
    "train.seed": "SEED",
    "train.cudnn_benchmark": "CUDNN_BENCHMARK",
    "train.amp.dtype": "SOLVER.AMP.DTYPE",
    "train.accumulate_steps": "SOLVER.ACCUMULATE_STEPS",
    "train.ema.enabled": "SOLVER.EMA.ENABLED",
    "train.ema.decay": "SOLVER.EMA.DECAY",
    "train.ema.warmup": "SOLVER.EMA.WARMUP",
    "train.clip.max_norm": "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",  # of the whole model's gradient
    "train.clip.norm_type": "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
    "train.bad_images": "DATASETS.BAD_IMAGES",
    "dataloader.train.total_batch_size": "SOLVER.IMS_PER_BATCH",
    "dataloader.train.num_workers": "DATALOADER.NUM_WORKERS",
    "dataloader.train.aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
}
# `train` keys that the trainer reads itself, and those of detectron2's that do nothing here.
OTHER_TRAIN_KEYS = ("log_period", "checkpointer.max_to_keep", "ddp")
# Keys in messages of the engine and of the teacher, by the name that a LazyConfig has for them.
WORDS = {
    **{ours: name for name, ours in KEYS.items()},
    "SOLVER.CLIP_GRADIENTS": "train.clip",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.OPTIMIZER": "optimizer",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "MODEL.ROI_HEADS.NUM_CLASSES": "model.roi_heads.num_classes",
    "INPUT.FORMAT": "model.input_format",
    "KD.TEACHER.CONFIG_FILE": "model.teacher.config_file",
    "KD.TEACHER.OVERRIDES": "model.teacher.overrides",
    "KD.TEACHER.WEIGHTS": "model.teacher.weights",
    "KD.TEACHER.ALLOW_RANDOM": "model.teacher.allow_random",
}
PARTS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
# What may differ between a run and its resumption, as `checkpoint.resume.IGNORED_ON_RESUME`.
IGNORED_ON_RESUME = (
    "train.output_dir",
    "train.bad_images",
    "train.init_checkpoint",
    "train.checkpointer",
    "train.eval_period",
    "train.log_period",
    "train.device",
    "train.cudnn_benchmark",
    "train.ddp",
    "dataloader.train.num_workers",
    "dataloader.test",
    "dataloader.evaluator",
)


def engine_config(lazy: DictConfig) -> CfgNode:
    """The engine's config of a LazyConfig: its `train` node, and what the checks of a training ask for.

    Model, optimizer, schedule and data are built from the LazyConfig itself.

    Raises:
        UserError: a part that is missing, or a value of the wrong type.
    """
    missing = [part for part in PARTS if part not in lazy]
    if missing:
        raise UserError(f"--config-file: it has no `{missing[0]}`: a LazyConfig that trains defines {', '.join(PARTS)}")
    kept = select(lazy, "train.checkpointer.max_to_keep")
    if kept is not None and not (type(kept) is int and kept > 0):
        raise UserError(f"train.checkpointer.max_to_keep is {kept!r}, expected a whole number above 0, or None for all")
    defaults, values = kd_defaults(), {}
    for name, key in KEYS.items():
        if (value := select(lazy, name)) is not None:
            values[key] = coerce(value, lookup(defaults, key), name, "the LazyConfig")
    cfg = as_yacs(lazy)
    set_values(cfg, values)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip.ENABLED, clip.CLIP_TYPE = select(lazy, "train.clip.max_norm") is not None, "full_model"
    # To the engine the optimizer is a name that a checkpoint is compared by.
    cfg.SOLVER.OPTIMIZER = name_of(lazy.optimizer.get("_target_", "?"))
    cfg.SOLVER.WARMUP_ITERS = round((select(lazy, "lr_multiplier.warmup_length") or 0) * cfg.SOLVER.MAX_ITER)
    warn_of_unread(lazy)
    return cfg


def warn_of_unread(lazy: DictConfig) -> None:
    """Warn of keys under `train` that nothing reads."""
    known = [*KEYS, *(f"train.{key}" for key in OTHER_TRAIN_KEYS)]
    for name in leaves(OmegaConf.to_container(lazy.train, resolve=False), "train"):
        if not any(f"{name}.".startswith(f"{key}.") for key in known):
            logger.warning("%s is not read by lazyconfig_train_net", name)


def leaves(tree: Mapping[str, Any], prefix: str) -> list[str]:
    """The dotted names of the values in nested mappings."""
    found = []
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        found += leaves(value, name) if isinstance(value, Mapping) else [name]
    return found


def in_lazy_words(message: str) -> str:
    """A message of the engine with the LazyConfig's names of its keys."""
    for ours in sorted(WORDS, key=len, reverse=True):
        message = message.replace(ours, WORDS[ours])
    return message


def as_tree(lazy: DictConfig) -> dict[str, Any]:
    """The parts of a LazyConfig that make a training, of plain values; what is callable by its name."""
    parts = {part: lazy[part] for part in PARTS if part in lazy}
    containers = {part: OmegaConf.to_container(node, resolve=False) for part, node in parts.items()}
    return named(containers)


def named(value: Any) -> Any:
    """Nested containers in which every object is replaced by its name."""
    if isinstance(value, Mapping):
        return {str(key): named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [named(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return name_of(value)


def name_of(value: Any) -> str:
    """A name that is the same in every process: of a class or function its own, of a partial also its arguments."""
    if isinstance(value, str):
        return value
    if isinstance(value, partial):
        arguments = [*map(argument_name, value.args)]
        arguments += [f"{key}={argument_name(argument)}" for key, argument in value.keywords.items()]
        return f"{name_of(value.func)}({', '.join(arguments)})"
    if not hasattr(value, "__qualname__"):
        return name_of(type(value)) if type(value).__repr__ is object.__repr__ else repr(value)
    module = getattr(value, "__module__", None) or ""
    return value.__qualname__ if "_cfg_loader" in module else f"{module}.{value.__qualname__}".lstrip(".")


def argument_name(value: Any) -> str:
    """`repr` of plain values, `name_of` others."""
    return repr(value) if value is None or isinstance(value, str | bool | int | float) else name_of(value)


def plain_model(lazy: DictConfig) -> DictConfig:
    """The `model` node as plain detectron2's, such as GeneralizedRCNN for DistilledRCNN, and without a teacher."""
    copy = deepcopy(lazy)
    name = name_of(lazy.model.get("_target_")).rpartition(".")[2]
    if (distilled := distilled_architecture(name)) is not None:
        copy.model._target_ = plain_class(distilled)
        for key in own_arguments(distilled):
            copy.model.pop(key, None)
    kind = SCMode.INSTANTIATE  # dataclasses stay what they are
    container = OmegaConf.to_container(copy.model, resolve=True, structured_config_mode=kind)
    return OmegaConf.create(container, flags={"allow_objects": True})


def own_arguments(distilled: type) -> set[str]:
    """The arguments of a distilled meta-architecture that its plain class does not have."""
    initialisers = [cls.__init__ for cls in distilled.__mro__ if getattr(cls, "distils", False)]
    arguments = [argument for function in initialisers for argument in signature(function).parameters.values()]
    return {argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY}


def write_lazy_student(lazy: DictConfig, path: Path) -> None:
    """Write the student's `model` node as a yaml from which plain detectron2 builds it:

        model = instantiate(LazyConfig.load("student.yaml").model)
        DetectionCheckpointer(model).load("model_final.pth")

    A config that holds a lambda has no such file; the log says so.
    """
    container = OmegaConf.to_container(plain_model(lazy), structured_config_mode=SCMode.INSTANTIATE)
    text = yaml.dump({"model": with_named_targets(container)}, default_flow_style=None, width=120, sort_keys=False)
    try:
        yaml.unsafe_load(text)
    except yaml.YAMLError as error:
        logger.warning("%s is not written: the config has a function without a name (%s)", path, one_line(error))
    else:
        write_text(path, text)


def with_named_targets(value: Any) -> Any:
    """Nested containers in which every `_target_` is the name of a class or function."""
    if isinstance(value, dict):
        return {k: name_of(v) if k == "_target_" else with_named_targets(v) for k, v in value.items()}
    return [with_named_targets(item) for item in value] if isinstance(value, list) else value
