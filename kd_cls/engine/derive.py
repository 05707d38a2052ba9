"""A student's config from a teacher, a network's name and a data set: what `kd_cls.distill` writes for its user."""

import difflib
import os
from dataclasses import dataclass, field
from typing import Any

import timm
from fvcore.common.config import CfgNode

import kd_cls.models  # noqa: F401  (registers the papers' networks with timm)
from kd_cls.config import get_cfg
from kd_cls.data import default_augmentation
from kd_core.utils.config import set_values
from kd_core.utils.errors import UserError, one_line

# The papers' settings for ImageNet (configs/ImageNet). DOT and DeepKD keep the step size of plain SGD (matched, ours).
KD = {"KD.LOSS.NAME": "kd", "KD.TASK_WEIGHT": 0.5, "KD.LOSS.WEIGHT": 0.5}
DKD = {"KD.LOSS.NAME": "dkd", "KD.LOSS.DKD.ALPHA": 1.0, "KD.LOSS.DKD.BETA": 0.5}
REVIEW = {"KD.FEATURE.NAME": "review", "KD.FEATURE.PREACT": "both"}
MASK = {"KD.LOSS.TOPK.ENABLED": True}
STREAMS = {"SOLVER.STEP": "matched"}
METHODS: dict[str, dict[str, Any]] = {
    "kd": KD,
    "dkd": DKD,
    "gdkd": {"KD.LOSS.NAME": "gdkd", "KD.LOSS.GDKD.W0": 0.5, "KD.LOSS.GDKD.W1": 1.0, "KD.LOSS.GDKD.W2": 1.0},
    "aekt": {"KD.LOSS.NAME": "aekt", "KD.LOSS.AEKT.EXPLICIT_WEIGHT": 1.0, "KD.LOSS.AEKT.IMPLICIT_WEIGHT": 0.5},
    "dist": {"KD.LOSS.NAME": "dist", "KD.LOSS.DIST.BETA": 2.0, "KD.LOSS.DIST.GAMMA": 2.0},
    "crld": {"KD.LOSS.NAME": "crld", "KD.TASK_WEIGHT": 2.0, "DATA.VIEWS": 2},
    "reviewkd": {"KD.LOSS.NAME": "none", **REVIEW},
    "reviewdkd": {**DKD, **REVIEW},
    "dot": {**KD, **STREAMS, "SOLVER.OPTIMIZER": "dot_sgd", "SOLVER.DOT.DELTA": 0.09},
    "deepkd": {**DKD, **MASK, **STREAMS, "SOLVER.OPTIMIZER": "deepkd_sgd"},
    "deepkd_kd": {**KD, **MASK, **STREAMS, "SOLVER.OPTIMIZER": "deepkd_sgd"},
}
TEMPERATURE = 1.0  # of all of them on ImageNet
BATCH = 64  # images per process
LR = {True: 0.01, False: 0.05}  # for 64 images: from weights, from scratch
EPOCHS = {True: 30.0, False: 100.0}
LONG_EPOCH = 1000  # iterations after which a checkpoint is due in any case


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        student: a name of timm's.
        weights: the student starts from: a file, one of `PACKAGED`, "timm" for timm's own, or "" for none.
        method: one of `METHODS`.
        data, root: DATA.NAME and DATA.ROOT.
        classes, images: in the training set.
        teacher: KD.TEACHER's keys.
        processes: GPUs, or CPU processes.
        size: side of the student's images; 0: the network's own.
        epochs: length of the training; None: 30 from weights, 100 from scratch.
        batch: images per iteration; None: 64 per process.
    """

    student: str
    weights: str
    method: str
    data: str
    root: str
    classes: int
    images: int
    teacher: dict[str, Any] = field(default_factory=dict)
    processes: int = 1
    size: int = 0
    epochs: float | None = None
    batch: int | None = None


def derive_student(request: Request) -> CfgNode:
    """kd_cls's config of the student that `request` describes.

    Raises:
        UserError: a student or method that does not exist, with what would be right.
    """
    if request.method not in METHODS:
        raise UserError(f"--method {request.method}: expected one of {', '.join(METHODS)}")
    check_name(request.student, "--student")
    cfg = get_cfg()
    set_values(cfg, {"KD.LOSS.TEMPERATURE": TEMPERATURE, **METHODS[request.method], **request.teacher})
    if request.method == "gdkd":  # the top group and the rest each need a class
        cfg.KD.LOSS.GDKD.K = min(cfg.KD.LOSS.GDKD.K, max(request.classes // 2, 1))
    cfg.MODEL.NAME = request.student
    cfg.MODEL.PRETRAINED, cfg.MODEL.WEIGHTS = (True, "") if request.weights == "timm" else (False, request.weights)
    set_data(cfg, request)
    set_schedule(cfg, request)
    return cfg


def set_data(cfg: CfgNode, request: Request) -> None:
    """Images, their size, and how they are read."""
    cfg.DATA.NAME, cfg.DATA.ROOT = request.data, request.root
    cfg.DATA.AUGMENTATION = default_augmentation(request.data)
    cfg.DATA.INPUT_SIZE = request.size or own_size(request.student)
    in_memory = request.data == "digits"
    cfg.DATA.NUM_WORKERS = 0 if in_memory else min((os.cpu_count() or 1) // request.processes, 8)
    cfg.DATA.VAL_BATCH = 128


def set_schedule(cfg: CfgNode, request: Request) -> None:
    """Batch, learning rate (linear in the batch), length and warm-up."""
    solver, from_weights = cfg.SOLVER, bool(request.weights)
    batch = request.batch or min(BATCH * request.processes, request.images)
    solver.IMS_PER_BATCH = max(batch // request.processes, 1) * request.processes
    solver.BASE_LR = LR[from_weights] * solver.IMS_PER_BATCH / BATCH
    solver.WEIGHT_DECAY = 1e-4
    solver.EPOCHS = EPOCHS[from_weights] if request.epochs is None else request.epochs
    solver.SCHEDULE.NAME = "cosine"
    solver.SCHEDULE.WARMUP_EPOCHS = round(solver.EPOCHS / 20, 3)
    for node in (cfg.KD.LOSS, cfg.KD.FEATURE):
        node.WARMUP_EPOCHS = min(1.0, solver.SCHEDULE.WARMUP_EPOCHS)
    solver.CLIP_GRADIENTS.ENABLED = True
    solver.EVAL_PERIOD = max(int(solver.EPOCHS // 10), 1)
    if request.images // solver.IMS_PER_BATCH > LONG_EPOCH:
        solver.CHECKPOINT_PERIOD = LONG_EPOCH


def without_teacher(cfg: CfgNode) -> CfgNode:
    """The same student and schedule, trained on the labels alone."""
    plain, defaults = cfg.clone(), get_cfg()
    plain.KD = defaults.KD
    plain.DATA.VIEWS, plain.DATA.VIEWS_AT_ONCE = defaults.DATA.VIEWS, defaults.DATA.VIEWS_AT_ONCE
    plain.SOLVER.MOMENTA = defaults.SOLVER.MOMENTA
    if plain.SOLVER.OPTIMIZER in ("dot_sgd", "deepkd_sgd"):  # the others train without a teacher, too
        for key in ("OPTIMIZER", "STEP", "DOT", "DEEPKD"):
            plain.SOLVER[key] = defaults.SOLVER[key]
    return plain


def check_name(name: str, option: str) -> None:
    """Refuse a network that timm does not know, with the names nearest to it."""
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has the names"
        raise UserError(f"{option} {name} is not a network that timm knows; {hint}")


def check_published(name: str, option: str) -> None:
    """Fetch timm's weights of a network, so that a missing file is reported before anything is trained."""
    try:
        timm.create_model(name, pretrained=True)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"{option} {name}: timm has no weights for it, or cannot fetch them ({one_line(error)}); give "
            f"{option}-weights FILE"
        ) from error


def own_size(name: str) -> int:
    """Side of the images that a network was made for."""
    return timm.create_model(name).pretrained_cfg["input_size"][-1]
