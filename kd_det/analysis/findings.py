"""Everything that a training still lacks, in one list; and a config that runs without it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from kd_det.checks import check_backbone, check_frozen_stem, check_max_iter, check_meta_architecture
from kd_det.config import build_box_loss
from kd_det.data import check_datasets, register_datasets
from kd_det.modeling.teacher.build import each_teacher, teacher_config
from kd_det.solver import check_images, check_solver, scale_to_world_size

STAND_IN = "dry_run_digits"


@dataclass
class Findings:
    """What `look` found.

    Attributes:
        missing: one sentence a thing, which names the key and the fix; training would not start, or come to nothing.
        to_fetch: weights that training downloads when it starts, which nobody has looked at.
        stood_in: what the dry run puts in the place of what is missing.
        runnable: the config for that number of processes, with all of that replaced.
    """

    missing: list[str] = field(default_factory=list)
    to_fetch: list[str] = field(default_factory=list)
    stood_in: list[str] = field(default_factory=list)
    runnable: CfgNode | None = None

    def passes(self, check: Callable[..., Any], *args: Any) -> bool:
        """Whether `check` does; what it complains of joins the list."""
        try:
            check(*args)
        except (ValueError, OSError) as error:
            if str(error) not in self.missing:
                self.missing.append(str(error))
            return False
        return True


def look(cfg: CfgNode, world_size: int) -> Findings:
    """Check all that can be checked without building anything, stopping at nothing."""
    found = Findings()
    scales = found.passes(scale_to_world_size, cfg, world_size)
    runnable = (scale_to_world_size(cfg, world_size) if scales else cfg).clone()
    runnable.defrost()
    found.passes(check_solver, cfg)
    found.passes(check_images, runnable.SOLVER.IMS_PER_BATCH, world_size, runnable.SOLVER.ACCUMULATE_STEPS)
    for check in (check_meta_architecture, check_backbone, check_max_iter, check_frozen_stem, build_box_loss):
        found.passes(check, cfg)
    if cfg.WANDB.ENABLED and find_spec("wandb") is None:
        found.missing.append("WANDB.ENABLED is True, but the package wandb is not installed: pip install wandb")
    look_for_data(found, cfg, runnable)
    look_for_weights(found, cfg, runnable)
    look_for_teachers(found, cfg, runnable)
    found.runnable = runnable
    return found


def look_for_data(found: Findings, cfg: CfgNode, runnable: CfgNode) -> None:
    """Every data set by itself; the digits stand in where one to train on is missing."""
    found.passes(register_datasets, cfg)
    complete = bool(cfg.DATASETS.TRAIN)
    if not complete:
        found.missing.append("DATASETS.TRAIN is empty: name a data set, or add one's own with DATASETS.REGISTER")
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            alone = cfg.clone()
            alone.defrost()
            alone.DATASETS[key] = (name,)
            complete &= found.passes(check_datasets, alone, (key,)) or key == "TEST"
    if not complete:
        runnable.DATASETS.TRAIN = (STAND_IN,)
        runnable.DATASETS.PROPOSAL_FILES_TRAIN = ()
        runnable.INPUT.RANDOM_FLIP = "none"  # keypoints that stand in have no left and right
        found.stood_in.append("the built-in digits, enlarged to INPUT.MIN_SIZE_TRAIN, in the place of DATASETS.TRAIN")
        register_stand_in(cfg)


def look_for_weights(found: Findings, cfg: CfgNode, runnable: CfgNode) -> None:
    """The student's initial weights."""
    for node, key in ((runnable.MODEL, "MODEL.WEIGHTS"), (runnable.MODEL.TIMM, "MODEL.TIMM.WEIGHTS")):
        if not there(found, key, node.WEIGHTS, "tools/convert_weights.py makes ImageNet weights"):
            node.WEIGHTS = ""
            found.stood_in.append(f"random weights in the place of {key}")
    if cfg.MODEL.TIMM.PRETRAINED:
        runnable.MODEL.TIMM.PRETRAINED = False
        found.to_fetch.append(f"MODEL.TIMM.PRETRAINED: timm's {cfg.MODEL.TIMM.NAME}")
        found.stood_in.append("random weights in the place of MODEL.TIMM.PRETRAINED")


def look_for_teachers(found: Findings, cfg: CfgNode, runnable: CfgNode) -> None:
    """Config and weights of every teacher; without a config of it, the student's step is a plain one."""
    if cfg.KD.LOSS.NAME == "none":
        return
    try:
        teachers = each_teacher(cfg)
    except ValueError as error:
        found.missing.append(str(error))
        teachers = []
    built = bool(teachers)
    for index, one in enumerate(teachers):
        group = f"KD.TEACHERS[{index}]" if cfg.KD.TEACHERS else "KD.TEACHER"
        built &= found.passes(teacher_config, one)
        node = one.KD.TEACHER
        if not node.WEIGHTS and not node.ALLOW_RANDOM:
            found.missing.append(f"{group}.WEIGHTS is empty: name the teacher's weights")
        elif there(found, f"{group}.WEIGHTS", node.WEIGHTS, "train the teacher, or give the path of its weights"):
            continue
        use_random_teacher(runnable, index)
        found.stood_in.append(f"random weights in the place of {group}.WEIGHTS")
    if not built:
        runnable.KD.LOSS.NAME, runnable.SOLVER.OPTIMIZER, runnable.SOLVER.MOMENTA = "none", "sgd", ""
        found.stood_in.append("a plain step in the place of one with a teacher")


def use_random_teacher(cfg: CfgNode, index: int) -> None:
    """Let teacher `index` be random."""
    cfg.KD.TEACHER.ALLOW_RANDOM = True
    if cfg.KD.TEACHERS:
        cfg.KD.TEACHERS[index] = [cfg.KD.TEACHERS[index][0], ""]
    else:
        cfg.KD.TEACHER.WEIGHTS = ""


def there(found: Findings, key: str, path: str, fix: str) -> bool:
    """Whether the file `path` that `key` names is on this machine, or no file is named."""
    if not path or os.path.isfile(path):
        return True
    if "://" in path:
        found.to_fetch.append(f"{key}: {path}")
    else:
        start = "" if os.path.isabs(path) else f"; relative paths start at the working folder, {os.getcwd()}"
        found.missing.append(f"{key}: there is no file {path} ({fix}{start})")
    return False


def register_stand_in(cfg: CfgNode) -> None:
    """The digits under the name STAND_IN, with the model's classes, and masks and keypoints where it learns them."""
    classes, points = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS

    def load() -> list[dict[str, Any]]:
        records = DatasetCatalog.get("digits_train")[:50]
        for annotation in (a for record in records for a in record["annotations"]):
            x, y, width, height = annotation["bbox"]
            annotation["category_id"] %= classes
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
            if cfg.MODEL.KEYPOINT_ON:
                annotation["keypoints"] = [x + width / 2, y + height / 2, 2] * points
        return records

    if STAND_IN in DatasetCatalog:
        DatasetCatalog.remove(STAND_IN)
    DatasetCatalog.register(STAND_IN, load)
