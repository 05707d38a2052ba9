"""All problems of a config in one list, and a config that runs without what is missing."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from kd_core.losses.feature_config import distils
from kd_core.utils.config import lookup
from kd_core.utils.data_check import summary
from kd_core.utils.errors import UserError
from kd_det.checks import Check, failures, training_checks
from kd_det.data import check_dataset
from kd_det.data.check import UNREADABLE, check_coco, coco_paths, label_maps_of
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys
from kd_det.modeling.teacher.build import each_teacher
from kd_det.solver import scale_to_world_size

STAND_IN = "dry_run_digits"


@dataclass
class Findings:
    """What `collect_problems` found.

    Attributes:
        missing: a sentence for each problem that would stop the training, with the key and the fix.
        to_fetch: weights that training downloads when it starts; they are not checked.
        stood_in: what the dry run uses in place of what is missing.
        runnable: the config for that number of processes, with all of that replaced.
    """

    missing: list[str] = field(default_factory=list)
    to_fetch: list[str] = field(default_factory=list)
    stood_in: list[str] = field(default_factory=list)
    runnable: CfgNode | None = None


def collect_problems(cfg: CfgNode, world_size: int) -> Findings:
    """Make every check of a training, and replace what is missing."""
    failed = failures(training_checks(cfg, world_size))
    found, keys = Findings(list(failed)), set(failed.values())
    try:
        found.runnable = scale_to_world_size(cfg, world_size).clone()
    except UserError:  # it is among the problems
        found.runnable = cfg.clone()
    found.runnable.defrost()
    if keys & {"DATASETS", "DATASETS.REGISTER", "DATASETS.TRAIN"}:
        use_digits(found)
    replace_weights(found, keys)
    if distils(cfg.KD):
        replace_teachers(found, keys)
    return found


def unreadable_images(cfg: CfgNode) -> list[str]:
    """A sentence for each data set with images or label maps that cannot be read: every file of DATASETS.TRAIN and TEST
    is decoded.

    Data sets that are not here are passed over, since `collect_problems` names them. So are images that
    DATASETS.BAD_IMAGES leaves out of a training.
    """
    splits = {name: key for key in ("TEST", "TRAIN") for name in cfg.DATASETS[key]}
    checks = [Check(f"DATASETS.{key}", partial(check_dataset, cfg, key, name)) for name, key in splits.items()]
    here = [name for name, check in zip(splits, checks, strict=True) if not failures([check])]
    with_maps = PIXEL_CLASSES in class_keys(cfg.MODEL.META_ARCHITECTURE)
    found = []
    for name in here:
        DatasetCatalog.get(name)  # the built-in data are written when they are first asked for
        skipped = UNREADABLE if cfg.DATASETS.BAD_IMAGES == "skip" and splits[name] == "TRAIN" else ()
        problems: dict[str, list[str]] = {}
        if paths := coco_paths(name):
            (file,), _ = check_coco([paths])
            problems |= {kind: file.report.problems[kind] for kind in UNREADABLE if kind in file.report.problems}
        if with_maps:
            problems |= label_maps_of(name, cfg.MODEL.SEM_SEG_HEAD).check_files().problems
        found += [
            f"DATASETS.{splits[name]}: {name}: {summary(kind, places)}"
            for kind, places in problems.items()
            if kind not in skipped
        ]
    return found


def use_digits(found: Findings) -> None:
    """Replace the training set by the built-in digits."""
    cfg = found.runnable
    cfg.DATASETS.TRAIN, cfg.DATASETS.PROPOSAL_FILES_TRAIN = (STAND_IN,), ()
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute":  # the digits are square
        cfg.INPUT.MIN_SIZE_TRAIN = (round(max(cfg.INPUT.CROP.SIZE)),)
    cfg.INPUT.RANDOM_FLIP = "none"  # the substitute keypoints have no left and right
    found.stood_in.append("the built-in digits, enlarged to INPUT.MIN_SIZE_TRAIN, in the place of DATASETS.TRAIN")
    register_stand_in(cfg)


def replace_weights(found: Findings, failed: set[str]) -> None:
    """The student's initial weights: random ones for those that are missing or still to be downloaded."""
    model = found.runnable.MODEL
    if model.WEIGHTS:
        model.TIMM.WEIGHTS, model.TIMM.PRETRAINED = "", False  # a training does not read them either
    for node, key in ((model, "MODEL.WEIGHTS"), (model.TIMM, "MODEL.TIMM.WEIGHTS")):
        if not usable(found, key, node.WEIGHTS, failed):
            node.WEIGHTS = ""
            found.stood_in.append(f"random weights in the place of {key}")
    if model.TIMM.PRETRAINED:
        model.TIMM.PRETRAINED = False
        found.to_fetch.append(f"MODEL.TIMM.PRETRAINED: timm's {model.TIMM.NAME}")
        found.stood_in.append("random weights in the place of MODEL.TIMM.PRETRAINED")


def replace_teachers(found: Findings, failed: set[str]) -> None:
    """Random weights for those that are missing; a plain step where a teacher cannot be built."""
    cfg = found.runnable
    teachers = [] if "KD.TEACHERS" in failed else each_teacher(cfg)
    groups = [f"KD.TEACHERS[{index}]" if cfg.KD.TEACHERS else "KD.TEACHER" for index in range(len(teachers))]
    for index, (group, one) in enumerate(zip(groups, teachers, strict=True)):
        if not usable(found, f"{group}.WEIGHTS", one.KD.TEACHER.WEIGHTS, failed):
            use_random_teacher(cfg, index)
            found.stood_in.append(f"random weights in the place of {group}.WEIGHTS")
    if not teachers or any(f"{group}.CONFIG_FILE" in failed for group in groups):
        cfg.KD.LOSS.NAME, cfg.KD.FEATURE.NAME, cfg.SOLVER.OPTIMIZER, cfg.SOLVER.MOMENTA = "none", "none", "sgd", ""
        found.stood_in.append("a plain step in the place of one with a teacher")


def use_random_teacher(cfg: CfgNode, index: int) -> None:
    """Let teacher `index` have random weights."""
    cfg.KD.TEACHER.ALLOW_RANDOM = True
    if cfg.KD.TEACHERS:
        name, _, *overrides = cfg.KD.TEACHERS[index]
        cfg.KD.TEACHERS[index] = [name, "", *overrides]
    else:
        cfg.KD.TEACHER.WEIGHTS = ""


def usable(found: Findings, key: str, path: str, failed: set[str]) -> bool:
    """Whether the weights that `key` names are on this machine, or need not be; notes those to be downloaded."""
    if "://" in path:
        found.to_fetch.append(f"{key}: {path}")
    return key not in failed and "://" not in path


def register_stand_in(cfg: CfgNode) -> None:
    """The digits under the name STAND_IN, with the classes, masks, keypoints and label maps that the model learns."""
    keys = class_keys(cfg.MODEL.META_ARCHITECTURE)
    source = "digits_panoptic_train" if PIXEL_CLASSES in keys else "digits_train"
    classes = lookup(cfg, keys[0])
    points = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS

    def load() -> list[dict[str, Any]]:
        records = DatasetCatalog.get(source)[:50]
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
