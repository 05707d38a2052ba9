"""Every config key that kd_det adds to detectron2's, each with its meaning."""

from collections.abc import Callable
from functools import partial

from detectron2.config import CfgNode, get_cfg
from torch import nn

from kd_core.losses import FeatureLoss
from kd_core.losses.config import add_loss_config, build_kd_loss
from kd_core.losses.feature_config import add_feature_config, build_feature_loss
from kd_det.compat import add_deeplab_config


def add_kd_config(cfg: CfgNode) -> None:
    """Add kd_det's keys to a detectron2 config, with their defaults."""
    cfg.KD = CfgNode()
    # The distillation loss and its parameters; the keys are those of kd_core.losses, shared with kd_cls.
    cfg.KD.LOSS = CfgNode()
    add_loss_config(cfg.KD.LOSS)
    # Iterations over which the distillation loss rises linearly from 0 to its full weight.
    cfg.KD.LOSS.WARMUP_ITERS = 0

    # A loss between feature maps, beside KD.LOSS or alone (docs/methods/reviewkd.md): the keys of kd_core.losses.
    cfg.KD.FEATURE = CfgNode()
    add_feature_config(cfg.KD.FEATURE)
    # Iterations over which it rises linearly from 0 to its full weight.
    cfg.KD.FEATURE.WARMUP_ITERS = 0
    # The student's maps that are compared, each with the teacher's of the same stride. Empty: all that have one.
    cfg.KD.FEATURE.IN_FEATURES = []

    cfg.KD.TEACHER = CfgNode()
    # A complete detectron2 yaml or a LazyConfig .py (code, which is run): a path, or a name in detectron2's model zoo.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # Overrides of a LazyConfig: a list such as [model.backbone.net.depth=6].
    cfg.KD.TEACHER.OVERRIDES = []
    # The teacher's weights: a path, a URL or a detectron2:// name. The yaml's own MODEL.WEIGHTS is never used.
    cfg.KD.TEACHER.WEIGHTS = ""
    # Accept a teacher with random weights. For tests only.
    cfg.KD.TEACHER.ALLOW_RANDOM = False
    # Report the teacher's AP on DATASETS.TEST before training starts.
    cfg.KD.TEACHER.EVALUATE = False
    # Size of the teachers' image, as a factor of the student's: with 2.0 a student at 400 px learns from a teacher at
    # 800 px, with the same crop and flip. The data loader then holds two images in memory in place of one.
    cfg.KD.TEACHER.IMAGE_SCALE = 1.0
    add_speed_config(cfg.KD)
    add_distillation_config(cfg.KD)

    # The user's COCO-format data sets: a list of [name, json file, image folder].
    cfg.DATASETS.REGISTER = []
    # The user's data sets of label maps: a list of [name, image folder, label folder, class 0, class 1, …]. A label map
    # is a png of class ids under its image's name; 255 is ignored.
    cfg.DATASETS.REGISTER_SEM_SEG = []
    # A training image that cannot be decoded: "error" ends the training and names the file; "skip" logs it once and
    # takes the next image in its place, the same one after a resume.
    cfg.DATASETS.BAD_IMAGES = "error"

    cfg.REPORT = CfgNode()
    # Write OUTPUT_DIR/report.html at every evaluation and at the end: results, curves and pictures of this run.
    cfg.REPORT.ENABLED = True

    cfg.WANDB = CfgNode()
    # Send the scalars to Weights & Biases (needs the wandb package).
    cfg.WANDB.ENABLED = False
    # The project there. The run is named after the folder OUTPUT_DIR.
    cfg.WANDB.PROJECT = "decoupled-kd"

    add_timm_config(cfg)
    add_solver_config(cfg.SOLVER)


def add_timm_config(cfg: CfgNode) -> None:
    """The keys of `build_timm_fpn_backbone`; plain detectron2 needs no others for a student with such a backbone."""
    cfg.MODEL.TIMM = CfgNode()
    # A timm model, with or without the tag of its weights: mobilenetv2_100, convnext_tiny.fb_in22k, … Its feature maps
    # of stride 4 to 32 are named res2 to res5, as those of detectron2's ResNets; MODEL.FPN and FREEZE_AT mean the same.
    cfg.MODEL.TIMM.NAME = ""
    # Start from timm's pretrained weights, which timm downloads and caches. Ignored where MODEL.WEIGHTS is given.
    cfg.MODEL.TIMM.PRETRAINED = False
    # Start from a classifier's weights in a local file (.safetensors, .pth), with timm's names. Ignored then, too.
    cfg.MODEL.TIMM.WEIGHTS = ""
    # Stages to take feature maps from (timm's out_indices). Empty: timm's default.
    cfg.MODEL.TIMM.OUT_INDICES = []
    # "BN": the network's own norms. "FrozenBN": every BatchNorm with fixed statistics and weights. "SyncBN": BatchNorm
    # synchronized over the processes.
    cfg.MODEL.TIMM.NORM = "BN"
    # More arguments of timm.create_model: a list of [argument, value], such as [[drop_path_rate, 0.1]].
    cfg.MODEL.TIMM.KWARGS = []


def add_speed_config(node: CfgNode) -> None:
    """The keys of KD that change the speed of a step, and its results by rounding only (docs/detection.md)."""
    # Channels-last memory format of the student's convolutions.
    node.CHANNELS_LAST = False
    # torch.compile the student's backbone and box head; falls back to eager, with a warning, where that fails.
    node.COMPILE = False
    # The same for every teacher.
    node.TEACHER.COMPILE = False
    # Fold the frozen batch norms of every teacher into its convolutions.
    node.TEACHER.FOLD_BN = True
    # Channels-last memory format of every teacher's backbone and box head.
    node.TEACHER.CHANNELS_LAST = False
    # On CUDA, run the first teacher's backbone on a second stream beside the student's forward pass.
    node.TEACHER.OVERLAP = False
    # Precision of every teacher's backbone and box head: "student", as the student's under SOLVER.AMP; "float32";
    # "bfloat16"; "float16". ROI pooling is in float32, and so is the classifier unless this is "student".
    node.TEACHER.DTYPE = "student"


def add_distillation_config(node: CfgNode) -> None:
    """The keys of KD that say who teaches what (docs/detection.md)."""
    # Several teachers, in place of KD.TEACHER.CONFIG_FILE, WEIGHTS and OVERRIDES: a list of [config file, weights] or
    # [config file, weights, override, …].
    node.TEACHERS = []
    # How several teachers are combined: "log_probs", the mean of their log-probabilities is the target; "losses", the
    # loss is the mean of the losses against each.
    node.TEACHERS_MEAN = "log_probs"
    # Whose proposals are distilled: "student", as in the papers; "student+teacher": also those of the teacher's RPN.
    node.PROPOSALS = "student"
    # Which sampled proposals are distilled: "all", as in the papers; "foreground"; "weighted": background rows have the
    # weight BACKGROUND_WEIGHT.
    node.ROWS = "all"
    # ROWS weighted: weight of a background row. The default balances POSITIVE_FRACTION .25: three to one.
    node.BACKGROUND_WEIGHT = 1 / 3
    # One-stage detectors (docs/dense.md).
    node.DENSE = CfgNode()
    # Which anchors are distilled: "all" that the focal loss counts, "foreground" or "background".
    node.DENSE.ROWS = "all"
    # γ of the weights |p_T − p_S|^γ of anchors and classes, as BCKD's; 0 for equal weights.
    node.DENSE.GAMMA = 1.0

    node.PIXELS = CfgNode()
    # Pixels are distilled at the stride of the student's segmentation head; True: enlarged to the size of the image.
    node.PIXELS.UPSAMPLE = False
    # "label": pixels with an ignored label are left out; "none": every pixel counts, for losses that read no label.
    node.PIXELS.IGNORE = "label"
    # Pixels per image that are distilled, drawn at random in each step; 0 for all.
    node.PIXELS.SAMPLE = 0

    node.PANOPTIC = CfgNode()
    # DistilledPanopticFPN: weight of the distillation of its boxes.
    node.PANOPTIC.BOX_WEIGHT = 1.0
    # The same for its pixels.
    node.PANOPTIC.PIXEL_WEIGHT = 1.0


def add_solver_config(node: CfgNode) -> None:
    """The keys of SOLVER that detectron2 does not have; SOLVER.MOMENTUM is the base momentum of every optimizer."""
    # "sgd": detectron2's own. "deepkd_sgd" and "dot_sgd": one momentum per gradient stream. "stream_adamw": AdamW with
    # one first-moment decay per stream (ours).
    node.OPTIMIZER = "sgd"

    node.DEEPKD = CfgNode()
    # "paper": the three keys below. "released": what the released code does. Its task gradient has tcg's momentum, so
    # tog takes DELTA_TCG, and DELTA_TOG is unused.
    node.DEEPKD.PRESET = "paper"
    # Momentum of the task gradient (all detection losses) = MOMENTUM + this; deepkd_sgd and stream_adamw.
    node.DEEPKD.DELTA_TOG = 0.075
    # The same for the target-class gradient: tckd, mass, explicit.
    node.DEEPKD.DELTA_TCG = -0.075
    # The same for the non-target gradient: nckd, within_*, implicit. .05 in 45 of the 72 released configs.
    node.DEEPKD.DELTA_NCG = 0.075

    node.DOT = CfgNode()
    # dot_sgd: the task's momentum is MOMENTUM − this, distillation's MOMENTUM + this. Published: .075, on ImageNet .09.
    node.DOT.DELTA = 0.075

    # Size of a stream's step, lr / (1 − its momentum): "paper" leaves it as it is (momentum .975 takes steps four times
    # as large as .9); "matched" (ours) scales it to lr / (1 − MOMENTUM), so that a learning rate tuned for plain SGD
    # still holds.
    node.STEP = "paper"
    # "auto": set the momenta from the streams' gradient signal-to-noise ratio. Empty: those above.
    node.MOMENTA = ""

    node.GSNR = CfgNode()
    # MOMENTA auto: iterations between two samples.
    node.GSNR.PERIOD = 200
    # MOMENTA auto: iterations until the momenta are set.
    node.GSNR.WINDOW = 4000
    # MOMENTA auto: share of each weight tensor that is measured, in (0, 1].
    node.GSNR.SAMPLE = 1.0
    # MOMENTA auto: largest difference from MOMENTUM.
    node.GSNR.SPAN = 0.075

    # Micro-batches per optimizer step. An iteration is one optimizer step on IMS_PER_BATCH images in all.
    node.ACCUMULATE_STEPS = 1
    # Mixed precision (SOLVER.AMP.ENABLED) in "float16", with a loss scaler, or in "bfloat16".
    node.AMP.DTYPE = "float16"

    node.EMA = CfgNode()
    # Moving average of the student's weights (timm's ModelEmaV3), evaluated beside it and saved under the key `ema`.
    node.EMA.ENABLED = False
    # Decay per step; .9998 averages over about 5000 iterations.
    node.EMA.DECAY = 0.9998
    # Let the decay rise from 0 to that value, so that a short training does not average its random start.
    node.EMA.WARMUP = False


def kd_defaults() -> CfgNode:
    """detectron2's default config with kd_det's keys, and those of DeepLab where this detectron2 has it."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    add_kd_config(cfg)
    return cfg


def build_box_loss(cfg: CfgNode) -> nn.Module | None:
    """The loss of `cfg.KD.LOSS` for a box head, in which background is a class."""
    return build_logit_loss(cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1)


def build_logit_loss(cfg: CfgNode, num_classes: int) -> nn.Module | None:
    """The loss of `cfg.KD.LOSS` for C classes, with its warm-up as a share of SOLVER.MAX_ITER; None for "none"."""
    return build_kd_loss(cfg.KD.LOSS, num_classes, "WARMUP_ITERS", cfg.SOLVER.MAX_ITER)


def build_feature(cfg: CfgNode) -> Callable[[list[int], list[int]], FeatureLoss] | None:
    """(student's channels, teacher's channels) → the loss of `cfg.KD.FEATURE`; None for "none"."""
    if cfg.KD.FEATURE.NAME == "none":
        return None
    options = {"warmup_key": "WARMUP_ITERS", "training_length": cfg.SOLVER.MAX_ITER}
    return partial(build_feature_loss, cfg.KD.FEATURE, **options)
