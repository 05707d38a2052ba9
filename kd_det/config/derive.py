"""A student's config from its teacher's: the same classes, data, heads and schedule, with a smaller network."""

import difflib
import math
import re
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from kd_core.utils.config import lookup, set_values
from kd_core.utils.errors import UserError
from kd_det.checkpoint.classifier_weights import IMAGENET_MEAN, IMAGENET_STD
from kd_det.config.defaults import kd_defaults
from kd_det.config.files import merge_file
from kd_det.modeling.meta_arch.registry import BOX_CLASSES, class_keys, distilled_name

RESNET_DEPTHS = (18, 34, 50, 101, 152)
# The papers' detection settings (docs/methods); DOT and DeepKD keep the step size of plain SGD (STEP matched, ours).
METHODS: dict[str, dict[str, Any]] = {
    "kd": {"KD.LOSS.NAME": "kd"},
    "dkd": {"KD.LOSS.NAME": "dkd", "KD.LOSS.DKD.ALPHA": 1.0, "KD.LOSS.DKD.BETA": 0.25},
    "gdkd": {"KD.LOSS.NAME": "gdkd", "KD.LOSS.GDKD.W0": 1.0, "KD.LOSS.GDKD.W1": 0.125, "KD.LOSS.GDKD.W2": 0.25},
    "aekt": {"KD.LOSS.NAME": "aekt", "KD.LOSS.AEKT.EXPLICIT_WEIGHT": 1.0, "KD.LOSS.AEKT.IMPLICIT_WEIGHT": 0.25},
}
METHODS["reviewkd"] = {"KD.LOSS.NAME": "none", "KD.FEATURE.NAME": "review"}
METHODS["reviewdkd"] = {**METHODS["dkd"], "KD.FEATURE.NAME": "review"}
METHODS["dot"] = {**METHODS["kd"], "SOLVER.OPTIMIZER": "dot_sgd", "SOLVER.STEP": "matched"}
METHODS["deepkd"] = {
    **METHODS["dkd"],
    "SOLVER.OPTIMIZER": "deepkd_sgd",
    "SOLVER.STEP": "matched",
    "SOLVER.DEEPKD.DELTA_TOG": 0.0,  # ours: the paper's .075 costs AP on short schedules (docs/methods/deepkd.md)
}

DATA_KEYS = ("DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.REGISTER")  # are the teacher's, or the command line's
SOFTMAX_ONLY = ("gdkd", "aekt")  # methods without a form for the sigmoids of a one-stage detector
SCRATCH_ITERATIONS = 0.1  # share of the schedule that a network without weights warms up for


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        student: "resnet18" and other ResNets, any name of timm's, or a detectron2 yaml.
        method: one of `METHODS`.
        scale: size of the student's images as a factor of the teacher's; its anchors follow.
        width: width of the student's FPN and box head as a factor of the teacher's.
        iterations: length of the training; or `epochs`; None: as many images as the teacher's config trains on.
        images: in the training set.
        processes: GPUs, or CPU processes.
        batch: images per iteration; None: the teacher's, and at most four per process.
        weights: a local file of ImageNet weights, or one of `PACKAGED`; "timm" takes timm's; "" trains from scratch.
    """

    student: str
    method: str = "dkd"
    scale: float = 1.0
    width: float = 1.0
    iterations: int | None = None
    epochs: float | None = None
    images: int = 0
    processes: int = 1
    batch: int | None = None
    weights: str = ""


def derive_student(teacher: CfgNode, request: Request) -> CfgNode:
    """kd_det's config of the student that `request` describes.

    Args:
        teacher: the teacher's complete config.
    Raises:
        UserError: a student, method or number that means nothing, with what would be right.
    """
    check_request(teacher, request)
    cfg = kd_defaults()
    if is_config(request.student):  # whole: what it leaves out has detectron2's default, not the teacher's value
        merge_file(cfg, request.student)
        cfg.MODEL.META_ARCHITECTURE = distilled_name(cfg.MODEL.META_ARCHITECTURE) or cfg.MODEL.META_ARCHITECTURE
        teachers = (*class_keys(teacher.MODEL.META_ARCHITECTURE), *DATA_KEYS)
        set_values(cfg, {key: lookup(teacher, key) for key in teachers})
    else:
        copy_common(teacher, cfg)
        own = (("MODEL", ("TIMM",)), ("SOLVER", ("OPTIMIZER", "MOMENTA", "STEP")))  # the teacher's own affair
        for node, keys in own:
            cfg[node].update({key: kd_defaults()[node][key] for key in keys})
        cfg.MODEL.META_ARCHITECTURE = distilled_name(teacher.MODEL.META_ARCHITECTURE) or "DistilledRCNN"
        cfg.MODEL.WEIGHTS = ""
        set_network(cfg, request)
        set_sizes(cfg, request)
    set_schedule(cfg, teacher, request)
    set_values(cfg, {"KD.LOSS.TEMPERATURE": 1.0, **METHODS[request.method]})
    if request.method == "gdkd":  # k of 5 suits many classes; the top group and the rest each need one
        cfg.KD.LOSS.GDKD.K = min(5, max(cfg.MODEL.ROI_HEADS.NUM_CLASSES // 2, 1))
    if one_stage(cfg):
        cfg.KD.DENSE.GAMMA = 0.0  # ours: BCKD's 1 ends below plain training on short schedules (docs/results.md)
    return cfg


def copy_common(source: CfgNode, target: CfgNode) -> None:
    """Copy the value of every key that both have, without those that name a teacher's own files."""
    for key, value in source.items():
        if isinstance(value, CfgNode) and isinstance(target.get(key), CfgNode):
            if key != "KD":
                copy_common(value, target[key])
        elif key in target and not isinstance(target[key], CfgNode):
            target[key] = value


def set_network(cfg: CfgNode, request: Request) -> None:
    """The student's backbone, its weights, and images as those weights expect them; a Faster R-CNN with FPN around."""
    model = cfg.MODEL
    depth = re.fullmatch(r"resnet(\d+)", request.student)
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if request.weights == "timm":  # detectron2's ResNets take a file only; timm's extractor has the same networks
        depth = None
    if depth and int(depth[1]) in RESNET_DEPTHS:
        retinanet = one_stage(cfg) and "p7" in model.RETINANET.IN_FEATURES
        model.BACKBONE.NAME = f"build_{'retinanet_' if retinanet else ''}resnet_fpn_backbone"
        model.RESNETS.DEPTH = int(depth[1])
        model.RESNETS.RES2_OUT_CHANNELS = 64 if int(depth[1]) < 50 else 256
        model.RESNETS.STRIDE_IN_1X1, model.RESNETS.NUM_GROUPS, model.RESNETS.WIDTH_PER_GROUP = False, 1, 64
        model.RESNETS.NORM = "FrozenBN" if request.weights else "BN"
        model.RESNETS.DEFORM_ON_PER_STAGE, model.RESNETS.RES5_DILATION = [False] * 4, 1
        model.WEIGHTS = request.weights
    else:
        mean, std = set_timm(cfg, request)
    stages = ["res2", "res3", "res4", "res5"]
    if one_stage(cfg):  # the levels of the teacher's FPN: the anchors are the teacher's
        stages = list(model.FPN.IN_FEATURES)
    model.RESNETS.OUT_FEATURES = model.FPN.IN_FEATURES = stages
    model.BACKBONE.FREEZE_AT = 2 if request.weights and depth else 0
    model.PIXEL_MEAN, model.PIXEL_STD = ([round(255 * v, 4) for v in values] for values in (mean, std))
    cfg.INPUT.FORMAT = "RGB"
    two_stage_c4 = model.ROI_HEADS.NAME in ("Res5ROIHeads",) or not model.RPN.IN_FEATURES[0].startswith("p")
    if two_stage_c4 and not one_stage(cfg):
        set_fpn_heads(cfg)


def check_request(teacher: CfgNode, request: Request) -> None:
    """Refuse what no student can be derived from; needs no data.

    Raises:
        UserError: names the option, and what would be right.
    """
    if request.method not in METHODS:
        raise UserError(f"--method {request.method}: expected one of {', '.join(METHODS)}")
    for name, value in (("--scale", request.scale), ("--width", request.width)):
        if not 0 < value <= 4:
            raise UserError(f"{name} is {value}: a factor of the teacher's, above 0 and at most 4")
    for name, value in (("--batch", request.batch), ("--iterations", request.iterations), ("--epochs", request.epochs)):
        if value is not None and value <= 0:
            raise UserError(f"{name} is {value}: expected a number above 0")
    architecture = teacher.MODEL.META_ARCHITECTURE
    if class_keys(architecture) != BOX_CLASSES:
        if request.scale != 1:
            raise UserError(
                f"--scale {request.scale:g}: the student of a {architecture} learns anchor by anchor, so that it sees "
                "images of the teacher's size: leave --scale out"
            )
        if request.method in SOFTMAX_ONLY:
            known = ", ".join(name for name in METHODS if name not in SOFTMAX_ONLY)
            raise UserError(f"--method {request.method}: a {architecture} has no softmax; expected one of {known}")
    if is_config(request.student):
        given = {"--scale": request.scale != 1, "--width": request.width != 1, "--student-weights": request.weights}
        if names := [name for name, is_given in given.items() if is_given]:
            raise UserError(
                f"{', '.join(names)} with --student {request.student}, which is a whole config: set its sizes and "
                "MODEL.WEIGHTS there"
            )


def is_config(student: str) -> bool:
    return student.endswith((".yaml", ".yml"))


def one_stage(cfg: CfgNode) -> bool:
    """Whether the student is a RetinaNet."""
    return cfg.MODEL.META_ARCHITECTURE == "DistilledRetinaNet"


def set_timm(cfg: CfgNode, request: Request) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A network of timm's; returns mean and std of the images that its weights were trained on."""
    import timm

    node, name = cfg.MODEL.TIMM, request.student
    if ":" not in name and not timm.is_model(name):
        if name.endswith(".py"):
            raise UserError(
                f"--student {name}: students are not derived from a LazyConfig; give it the teacher as `model.teacher` "
                "and train it with tools/lazyconfig_train_net.py (docs/detection.md)"
            )
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()."
        raise UserError(f"--student {name} is neither a yaml, nor resnet18 … resnet152, nor a model of timm's; {hint}")
    cfg.MODEL.BACKBONE.NAME, node.NAME = "build_timm_fpn_backbone", name
    if request.weights == "timm":
        node.PRETRAINED = True
    else:
        node.WEIGHTS = request.weights
    if "swin" in name:
        node.KWARGS = [["strict_img_size", False]]
    pretrained = timm.get_pretrained_cfg(name)
    return (pretrained.mean, pretrained.std) if pretrained is not None else (IMAGENET_MEAN, IMAGENET_STD)


def set_fpn_heads(cfg: CfgNode) -> None:
    """Heads over an FPN, for the student of a teacher that has none."""
    set_values(
        cfg,
        {
            "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
            "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
            "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 2.0]],
            "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
            "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
            "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
            "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        },
    )


def set_sizes(cfg: CfgNode, request: Request) -> None:
    """Smaller images (the teacher keeps its own), anchors to match, and a narrower FPN and box head."""
    model, size = cfg.MODEL, cfg.INPUT
    if request.scale != 1:
        size.MIN_SIZE_TRAIN = tuple(round(side * request.scale) for side in size.MIN_SIZE_TRAIN)
        for key in ("MAX_SIZE_TRAIN", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
            size[key] = round(size[key] * request.scale)
        sizes = model.ANCHOR_GENERATOR.SIZES
        model.ANCHOR_GENERATOR.SIZES = [[round(side * request.scale, 2) for side in level] for level in sizes]
        cfg.KD.TEACHER.IMAGE_SCALE = 1 / request.scale
    if request.width != 1:
        # Multiples of 32: group norms have 32 groups.
        model.FPN.OUT_CHANNELS = max(round(model.FPN.OUT_CHANNELS * request.width / 32), 1) * 32
        for key in ("FC_DIM", "CONV_DIM"):
            model.ROI_BOX_HEAD[key] = max(round(model.ROI_BOX_HEAD[key] * request.width / 32), 1) * 32


def set_schedule(cfg: CfgNode, teacher: CfgNode, request: Request) -> None:
    """Batch, learning rate (linear in the batch), length, steps and warm-up."""
    solver, theirs = cfg.SOLVER, teacher.SOLVER
    solver.IMS_PER_BATCH = request.batch or min(theirs.IMS_PER_BATCH, 4 * request.processes)
    solver.IMS_PER_BATCH = max(solver.IMS_PER_BATCH // request.processes, 1) * request.processes
    solver.REFERENCE_WORLD_SIZE = 0  # the batch is that of these processes
    solver.BASE_LR = theirs.BASE_LR * solver.IMS_PER_BATCH / theirs.IMS_PER_BATCH
    solver.MAX_ITER = iterations(theirs, solver.IMS_PER_BATCH, request)
    share = solver.MAX_ITER / theirs.MAX_ITER
    steps = (max(round(step * share), 1) for step in theirs.STEPS)
    solver.STEPS = tuple(step for step in steps if step < solver.MAX_ITER)
    solver.WARMUP_ITERS = min(max(theirs.WARMUP_ITERS, 100), max(solver.MAX_ITER // 6, 1))
    from_weights = has_weights(cfg)
    if not from_weights:
        solver.WARMUP_ITERS = max(solver.WARMUP_ITERS, math.ceil(SCRATCH_ITERATIONS * solver.MAX_ITER))
    solver.CLIP_GRADIENTS.ENABLED, solver.CLIP_GRADIENTS.CLIP_TYPE = True, "norm"
    solver.CLIP_GRADIENTS.CLIP_VALUE = 5.0 if from_weights else 1.0  # a narrow head dies of a large first step
    solver.CHECKPOINT_PERIOD = max(solver.MAX_ITER // 10, 1)
    cfg.TEST.EVAL_PERIOD = max(solver.MAX_ITER // 5, 1)
    cfg.SEED = max(cfg.SEED, 0)  # a resumed training then ends as one that was not interrupted


def has_weights(cfg: CfgNode) -> bool:
    """Whether a student starts from weights."""
    return bool(cfg.MODEL.WEIGHTS or cfg.MODEL.TIMM.WEIGHTS or cfg.MODEL.TIMM.PRETRAINED)


def iterations(teacher_solver: CfgNode, batch: int, request: Request) -> int:
    """The length that is asked for, or as many images as the teacher's config trains on."""
    if request.iterations is not None and request.epochs is not None:
        raise UserError("--iterations and --epochs both give the length of the training: keep one")
    if request.iterations is not None:
        count = request.iterations
    elif request.epochs is not None:
        count = math.ceil(request.epochs * request.images / batch)
    else:
        count = math.ceil(teacher_solver.MAX_ITER * teacher_solver.IMS_PER_BATCH / batch)
    if count < 1:
        raise UserError(f"the training would have {count} iterations: raise --iterations or --epochs")
    return count
