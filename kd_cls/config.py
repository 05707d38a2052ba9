"""Every config key of kd_cls with its meaning."""

import hashlib
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_core.losses import add_feature_config, add_loss_config
from kd_core.utils.config import find_config, lookup, merge_list, merge_mapping, read_yaml
from kd_core.utils.errors import UserError


def get_cfg() -> CfgNode:
    """A fresh config: every key of kd_cls with its default."""
    cfg = CfgNode()
    # Everything a run leaves: config.yaml, log.txt, metrics.json, TensorBoard events, last.pth, best.pth.
    cfg.OUTPUT_DIR = "output/cls"
    # Seed of every random choice. -1 draws one and writes it to OUTPUT_DIR/config.yaml.
    cfg.SEED = 0
    # Several seeds: one run per seed in OUTPUT_DIR/seed_<n>; mean ± std of the results in OUTPUT_DIR/summary.json.
    cfg.SEEDS = []
    # "auto": CUDA if available, else the CPU.
    cfg.DEVICE = "auto"
    # Iterations between two lines of the log and of metrics.json.
    cfg.LOG_PERIOD = 20
    # Write OUTPUT_DIR/report.html at every evaluation and at the end: results and curves of this run.
    cfg.REPORT = CfgNode({"ENABLED": True})
    # Send the metrics to Weights & Biases (needs the wandb package), under this project name.
    cfg.WANDB = CfgNode({"ENABLED": False, "PROJECT": "decoupled-kd"})
    add_model_config(cfg)
    add_data_config(cfg)
    add_distillation_config(cfg)
    add_solver_config(cfg)
    return cfg


def add_model_config(cfg: CfgNode) -> None:
    """MODEL: the student, or whichever network is trained."""
    cfg.MODEL = CfgNode()
    # Any name that timm.create_model knows; the papers' CIFAR networks are cifar_<name>.
    cfg.MODEL.NAME = "cifar_resnet8x4"
    # Further keyword arguments of timm.create_model, as a yaml mapping in a string: "{drop_path_rate: 0.1}".
    cfg.MODEL.KWARGS = ""
    # Weights to start from: a local file, a URL, or the package efficientnet-lite0, -lite1 or -lite2. Empty:
    # random, or timm's own if PRETRAINED is set.
    cfg.MODEL.WEIGHTS = ""
    # Start from timm's pretrained weights, with a new classifier if the number of classes differs.
    cfg.MODEL.PRETRAINED = False
    # Mean and std of the input normalisation, for pixel values in [0, 1]. Empty: those of the data set, or with initial
    # weights those that these were trained with: as our checkpoint says, else timm's pretrained_cfg.
    cfg.MODEL.MEAN = []
    cfg.MODEL.STD = []
    # Freeze the BatchNorm layers: eval mode, and no gradients for their weights.
    cfg.MODEL.FREEZE_BN = False
    # Channels-last memory format of student and teacher. Faster where it was measured (docs/performance.md), on CPUs
    # and a GPU.
    cfg.MODEL.CHANNELS_LAST = False
    # torch.compile the student; falls back to eager, with a message, if compilation fails.
    cfg.MODEL.COMPILE = False


def add_data_config(cfg: CfgNode) -> None:
    """DATA: the images and how they are read."""
    cfg.DATA = CfgNode()
    # digits (built in), cifar100, imagenet, tiny_imagenet, cub200, folder, or a prefixed name of timm's create_dataset.
    cfg.DATA.NAME = "digits"
    # Folder of the images; digits needs none.
    cfg.DATA.ROOT = ""
    # A training image that cannot be decoded: "error" ends the training and names the file; "skip" logs it once and
    # takes the next image in its place, the same one after a resume. A validation image always ends it.
    cfg.DATA.BAD_IMAGES = "error"
    # Let torchvision download the data set if it can (cifar100).
    cfg.DATA.DOWNLOAD = False
    # cifar, digits, imagenet, tiny_imagenet_64 or none. Empty: the data set's own.
    cfg.DATA.AUGMENTATION = ""
    # Keyword arguments of timm's create_transform for the augmentation imagenet, as a yaml mapping in a string.
    cfg.DATA.TIMM_OPTIONS = ""
    # After how many epochs the augmentations repeat, which keeps a teacher cache finite; 0: never.
    cfg.DATA.AUGMENTATION_EPOCHS = 0
    # Draw augmentations from (SEED, epoch, image). False: from each worker's own generator, which excludes a teacher
    # cache and a bitwise equal resume.
    cfg.DATA.REPRODUCIBLE = True
    # Views of each training image: 1, or 2 for mlkd and crld. The weak view has the augmentation; the strong one has
    # RandAugment and cutout besides. With 2 the classification loss is the sum over both.
    cfg.DATA.VIEWS = 1
    # Compute both views in one forward pass, which is faster. The student's BatchNorm then normalises weak and strong
    # images by the statistics of both together; with a pass each, as in the released code, by those of their own view.
    cfg.DATA.VIEWS_AT_ONCE = False
    # Side length of the student's input. 0: the model's own.
    cfg.DATA.INPUT_SIZE = 0
    # Number of training images, evenly spaced, to hold out and to validate on in place of the validation images, so
    # that hyperparameters are chosen without seeing those. The rest is trained on.
    cfg.DATA.HELD_OUT = 0
    # Number of images to use, evenly spaced over the split; 0: all.
    cfg.DATA.TRAIN_IMAGES = 0
    cfg.DATA.VAL_IMAGES = 0
    # Visit the training images in a new random order each epoch.
    cfg.DATA.SHUFFLE = True
    # Keep all images on the device and augment whole batches there (augmentation cifar, digits or none), since loader
    # workers cannot feed a small network on a GPU fast enough. Same distribution, different random draws.
    cfg.DATA.RESIDENT = False
    # Loader workers per training process.
    cfg.DATA.NUM_WORKERS = 4
    # Images per process and step of an evaluation; 0: as in training.
    cfg.DATA.VAL_BATCH = 0


def add_distillation_config(cfg: CfgNode) -> None:
    """KD: the loss and the teacher."""
    cfg.KD = CfgNode()
    # Weight of the classification loss.
    cfg.KD.TASK_WEIGHT = 1.0
    # The distillation loss and its parameters: the keys of kd_core.losses, shared with kd_det. "none": plain training.
    cfg.KD.LOSS = CfgNode()
    add_loss_config(cfg.KD.LOSS)
    # Epochs over which the distillation loss rises linearly from 0 to its full weight (may be a fraction).
    cfg.KD.LOSS.WARMUP_EPOCHS = 0.0

    # A loss between feature maps, beside KD.LOSS or alone (docs/methods/reviewkd.md): the keys of kd_core.losses.
    cfg.KD.FEATURE = CfgNode()
    add_feature_config(cfg.KD.FEATURE)
    # Epochs over which it rises linearly from 0 to its full weight (may be a fraction).
    cfg.KD.FEATURE.WARMUP_EPOCHS = 0.0
    # Whose maps are taken before their last activation: "none", "teacher" or "both".
    cfg.KD.FEATURE.PREACT = "teacher"
    # Which maps of timm's forward_intermediates are compared, as two lists of equal length. Empty: as many as both
    # networks have, from the coarsest, at most four. The pooled feature follows as a map of 1×1.
    cfg.KD.FEATURE.STUDENT_MAPS = []
    cfg.KD.FEATURE.TEACHER_MAPS = []

    cfg.KD.TEACHER = CfgNode()
    # The teacher's own kd_cls config, whose MODEL is the teacher. Relative paths start at the working directory.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # In place of a config file: a timm name, and keyword arguments as in MODEL.KWARGS.
    cfg.KD.TEACHER.NAME = ""
    cfg.KD.TEACHER.KWARGS = ""
    # The teacher's weights: a local file or a URL. Empty with CONFIG_FILE: last.pth in the OUTPUT_DIR of that config.
    cfg.KD.TEACHER.WEIGHTS = ""
    # Use timm's pretrained weights.
    cfg.KD.TEACHER.PRETRAINED = False
    # Mean, std and side length of the teacher's input. Empty and 0: those its weights were trained with.
    cfg.KD.TEACHER.MEAN = []
    cfg.KD.TEACHER.STD = []
    cfg.KD.TEACHER.INPUT_SIZE = 0
    # Train the teacher of CONFIG_FILE first if its weights are missing.
    cfg.KD.TEACHER.TRAIN_IF_MISSING = False
    # Accept a teacher with random weights. For tests only.
    cfg.KD.TEACHER.ALLOW_RANDOM = False
    # Report the teacher's accuracy before training starts.
    cfg.KD.TEACHER.EVALUATE = False
    # torch.compile the teacher; falls back to eager, with a message, if compilation fails.
    cfg.KD.TEACHER.COMPILE = False
    # Fold its batch norms into the convolutions before them: the same logits up to rounding.
    cfg.KD.TEACHER.FOLD_BN = True
    # Channels-last memory format of the teacher, also without MODEL.CHANNELS_LAST.
    cfg.KD.TEACHER.CHANNELS_LAST = False
    # Dtype of its weights and images: "float32" (with autocast as in SOLVER.AMP), "bfloat16" or "float16". The log says
    # how far the logits of the first batch move.
    cfg.KD.TEACHER.DTYPE = "float32"
    # Cache the teacher's logits on disk: "none", "full" (float32, exact) or "topk" (float16, the rest spread evenly).
    cfg.KD.TEACHER.CACHE = "none"
    # Folder of the cache. Empty: teacher_cache in OUTPUT_DIR.
    cfg.KD.TEACHER.CACHE_DIR = ""
    # Number of classes stored by CACHE "topk".
    cfg.KD.TEACHER.CACHE_TOPK = 20


def add_solver_config(cfg: CfgNode) -> None:
    """SOLVER: optimizer, schedule, precision, moving average, mixup."""
    cfg.SOLVER = CfgNode()
    # "sgd"; "dot_sgd", "deepkd_sgd" and "stream_adamw": one momentum per gradient stream (kd_core.optim); or timm's.
    cfg.SOLVER.OPTIMIZER = "sgd"
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.MOMENTUM = 0.9
    cfg.SOLVER.NESTEROV = False
    cfg.SOLVER.WEIGHT_DECAY = 5e-4
    # Apply weight decay to norms and biases too, as the papers do.
    cfg.SOLVER.DECAY_NORM_AND_BIAS = True
    # Momentum of each stream = MOMENTUM + its DELTA, for deepkd_sgd and stream_adamw (its first moment).
    # PRESET "paper": these three keys. "released", as in the released code: tog takes DELTA_TCG, DELTA_TOG is unused.
    cfg.SOLVER.DEEPKD = CfgNode({"PRESET": "paper", "DELTA_TOG": 0.075, "DELTA_TCG": -0.075, "DELTA_NCG": 0.075})
    # dot_sgd: the task's momentum is MOMENTUM − DELTA, distillation's MOMENTUM + DELTA.
    cfg.SOLVER.DOT = CfgNode({"DELTA": 0.075})
    # "paper" leaves a stream's step size as its momentum m makes it. "matched" (ours) scales it by (1−m)/(1−MOMENTUM),
    # so that a learning rate tuned for SGD still holds.
    cfg.SOLVER.STEP = "paper"
    # "auto": momenta from the measured gradient signal-to-noise ratio. Empty: those of OPTIMIZER.
    cfg.SOLVER.MOMENTA = ""
    # For MOMENTA auto: iterations between two samples, iterations until the momenta are set, share of each tensor that
    # is sampled, and the largest distance of a momentum from MOMENTUM.
    cfg.SOLVER.GSNR = CfgNode({"PERIOD": 200, "WINDOW": 4000, "SAMPLE": 1.0, "SPAN": 0.075})

    # Passes over the training images; may be a fraction.
    cfg.SOLVER.EPOCHS = 240.0
    # Images per optimizer step, over all processes and micro-batches.
    cfg.SOLVER.IMS_PER_BATCH = 64
    # Micro-batches per optimizer step.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # timm's schedule: multistep, cosine, step, poly, tanh, wsd, rsqrt, constant. MILESTONES and WARMUP in epochs.
    # GAMMA is the factor of multistep and step, and the power of poly (0.9 is usual). DECAY_EPOCHS is the interval of
    # step, and the length of the decay of wsd and rsqrt.
    # WARMUP_PREFIX True: the schedule starts after the warm-up and takes the epochs that are left. False: at epoch 0.
    cfg.SOLVER.SCHEDULE = CfgNode(
        {
            "NAME": "multistep",
            "MILESTONES": [150, 180, 210],
            "GAMMA": 0.1,
            "DECAY_EPOCHS": 30.0,
            "WARMUP_EPOCHS": 0.0,
            "WARMUP_LR": 1e-5,
            "WARMUP_PREFIX": False,
            "MIN_LR": 0.0,
        }
    )
    # Clip the norm of the gradient to this value, with one factor for all streams.
    cfg.SOLVER.CLIP_GRADIENTS = CfgNode({"ENABLED": False, "CLIP_VALUE": 5.0})
    # Automatic mixed precision in float16 (with a loss scaler) or bfloat16.
    cfg.SOLVER.AMP = CfgNode({"ENABLED": False, "DTYPE": "float16"})
    # Moving average of the weights (timm's ModelEmaV3), evaluated beside the student and saved as model_ema.
    cfg.SOLVER.EMA = CfgNode({"ENABLED": False, "DECAY": 0.9998, "WARMUP": False})
    # Replay the whole step as one CUDA graph, for small networks whose kernels are shorter than their launches. Needs
    # one process on a GPU, sgd, dot_sgd or deepkd_sgd, float32 or bfloat16; see kd_cls/engine/cuda_graph.py.
    cfg.SOLVER.CUDA_GRAPH = False
    cfg.SOLVER.LABEL_SMOOTHING = 0.0
    # timm's Mixup: ALPHA of mixup, CUTMIX_ALPHA of cutmix, PROB of mixing a batch.
    cfg.SOLVER.MIXUP = CfgNode({"ALPHA": 0.0, "CUTMIX_ALPHA": 0.0, "PROB": 1.0})
    # BatchNorm statistics of several processes before evaluation and saving: "reduce" (mean) or "broadcast" (rank 0's).
    cfg.SOLVER.DISTRIBUTE_BN = "reduce"
    # Iterations between two checkpoints (last.pth); 0: one per epoch.
    cfg.SOLVER.CHECKPOINT_PERIOD = 0
    # Epochs between two evaluations.
    cfg.SOLVER.EVAL_PERIOD = 1


def load_cfg(path: str, options: list[str] | None = None) -> CfgNode:
    """Read a config file with its `_BASE_` files, then the `KEY VALUE` words of a command line.

    Raises:
        UserError: no such file, an unknown key (the message suggests the nearest), or a value of the wrong type.
    """
    if not Path(find_config(path)).is_file():
        raise UserError(f"--config-file: there is no file {path}")
    cfg = get_cfg()
    values = read_yaml(path)
    if "DATASETS" in values or lookup(values, "MODEL.META_ARCHITECTURE") is not None:
        raise UserError(f"{path} is a detector's config: tools/train_net.py trains it, tools/distill.py distils it")
    if "MODEL.NUM_CLASSES" in (options or ()) or lookup(values, "MODEL.NUM_CLASSES") is not None:
        raise UserError("MODEL.NUM_CLASSES: the data (DATA.NAME, DATA.ROOT) say how many classes there are; drop it")
    merge_mapping(cfg, values, path)
    merge_list(cfg, options or [])
    return cfg


def parse_mapping(text: str, key: str) -> dict[str, Any]:
    """The yaml mapping in a config string.

    Raises:
        UserError: the string of `key` holds anything else.
    """
    try:
        value = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise UserError(f"{key} is {text!r}, which is not yaml: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{key} is {text!r}, expected a yaml mapping such as '{{drop_path_rate: 0.1}}'")
    return value


def config_hash(cfg: CfgNode) -> str:
    """Twelve hex digits of the config, without keys that do not change a result (output folder, logging, device)."""
    clone = cfg.clone()
    clone.defrost()
    for key in ("OUTPUT_DIR", "LOG_PERIOD", "WANDB", "SEEDS", "DEVICE"):
        del clone[key]
    return hashlib.sha256(clone.dump().encode()).hexdigest()[:12]
