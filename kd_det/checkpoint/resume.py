"""What `--resume` may continue, and what to say where a checkpoint or a config is of another training."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from torch import nn

from kd_core.losses.feature_config import distils
from kd_core.utils.errors import UserError
from kd_core.utils.resume import RESUME_HINT, check_same_run
from kd_core.utils.state_dict import check_fit
from kd_det.config import kd_defaults

logger = logging.getLogger(__name__)

# Keys, and groups of keys, that may differ between a run and its resumption: where files are, what is shown, how fast
# it goes, how it is evaluated, and where the student's first weights came from.
IGNORED_ON_RESUME = (
    "VERSION",
    "OUTPUT_DIR",
    "VIS_PERIOD",
    "CUDNN_BENCHMARK",
    "WANDB",
    "REPORT",
    "TEST",
    "DATALOADER.NUM_WORKERS",
    "DATASETS.BAD_IMAGES",
    "DATASETS.REGISTER",
    "DATASETS.REGISTER_SEM_SEG",
    "DATASETS.TEST",
    "DATASETS.PROPOSAL_FILES_TEST",
    "INPUT.MIN_SIZE_TEST",
    "INPUT.MAX_SIZE_TEST",
    "KD.CHANNELS_LAST",
    "KD.COMPILE",
    "KD.LOSS.COMPILE",
    "KD.TEACHER.CHANNELS_LAST",
    "KD.TEACHER.COMPILE",
    "KD.TEACHER.EVALUATE",
    "KD.TEACHER.FOLD_BN",
    "KD.TEACHER.OVERLAP",
    "MODEL.DEVICE",
    "MODEL.WEIGHTS",
    "MODEL.TIMM.PRETRAINED",
    "MODEL.TIMM.WEIGHTS",
    "MODEL.ROI_HEADS.NMS_THRESH_TEST",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
    "MODEL.RETINANET.NMS_THRESH_TEST",
    "MODEL.RETINANET.SCORE_THRESH_TEST",
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST",
    "MODEL.RPN.POST_NMS_TOPK_TEST",
    "MODEL.RPN.PRE_NMS_TOPK_TEST",
    "SOLVER.CHECKPOINT_PERIOD",
)


def check_state(state: dict[str, Any], optimizer_name: str, max_iter: int) -> None:
    """Refuse the trainer's state of another method or another schedule.

    Raises:
        UserError: names what was saved and what is configured.
    """
    saved = state.get("optimizer_name", "sgd")
    if saved != optimizer_name:
        raise UserError(
            f"The checkpoint to resume was trained with SOLVER.OPTIMIZER {saved}, but this config says "
            f"{optimizer_name}: resume with the same, or give its weights as MODEL.WEIGHTS to a training in another "
            "OUTPUT_DIR"
        )
    if state.get("max_iter", max_iter) != max_iter:
        raise UserError(
            f"The checkpoint to resume is of a training of {state['max_iter']} iterations, but "
            f"SOLVER.MAX_ITER is {max_iter}: that is another schedule. Resume with the same, or start anew "
            "from its weights"
        )
    if "_trainer" not in state:
        raise UserError(
            "The checkpoint to resume holds no optimizer: it was written by detectron2 0.5's own trainer, which saves "
            "none. Give its weights as MODEL.WEIGHTS to a training in another OUTPUT_DIR"
        )


def check_model(incompatible: Any, path: str) -> None:
    """Every weight of the student must have come out of the checkpoint `path`; raises UserError otherwise.

    Args:
        incompatible: what fvcore's checkpointer could not match.
    """
    wrong = [name for name, *_ in incompatible.incorrect_shapes] + list(incompatible.missing_keys)
    if wrong:
        raise UserError(
            f"--resume: {path} is of another model: {len(set(wrong))} weights of the student are not in it or have "
            f"another shape, the first is {wrong[0]}; {RESUME_HINT}"
        )


def load_feature(model: nn.Module, state: dict[str, Any], path: str) -> None:
    """Load the parameters of the feature loss, which the student's weights do not have.

    Raises:
        UserError: the checkpoint has none, or those of another loss.
    """
    feature = getattr(model, "feature", None)
    if feature is None:
        return
    saved = state.get("feature_loss", {})
    check_fit(saved, feature.state_dict(), f"--resume: the feature loss (KD.FEATURE) in {path}")
    feature.load_state_dict(saved)


def load_step(step: SimpleTrainer, state: dict[str, Any], path: str) -> None:
    """Load the optimizer's state, and warn of every setting in which it overrules the config.

    Raises:
        UserError: the state is of an optimizer of other parameters or streams.
    """
    configured = settings(step)
    try:
        step.load_state_dict(state)
    except (ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"--resume: the optimizer's state in {path} does not fit: {error}; {RESUME_HINT}") from error
    measured = getattr(step, "auto_momenta", None)
    for key, value in settings(step).items():
        set_by_measuring = key == "momenta" and measured is not None and measured.momenta is not None
        if value != configured.get(key, value) and not set_by_measuring:
            logger.warning(
                "--resume keeps the checkpoint's %s %s, not the config's %s", key, value, configured[key]
            )


def settings(step: SimpleTrainer) -> dict[str, Any]:
    """The options of the optimizer's first parameter group, except the current learning rate."""
    return {key: value for key, value in step.optimizer.param_groups[0].items() if key not in ("params", "lr")}


def check_begun(path: str, with_trainer: bool) -> None:
    """A file without a trainer's state has weights, but no training to resume."""
    if not with_trainer:
        raise UserError(
            f"--resume: {path} holds weights, but no training (key trainer): give it as MODEL.WEIGHTS, without --resume"
        )


def check_file(path: str) -> None:
    """`last_checkpoint` must name a file that is there."""
    if not Path(path).is_file():
        raise UserError(f"--resume: there is no file {path}, which last_checkpoint names; {other_checkpoints(path)}")


def other_checkpoints(path: str) -> str:
    """The way out, where the checkpoint `path` is of no use."""
    others = sorted(file.name for file in Path(path).parent.glob("model_[0-9]*.pth") if file.name != Path(path).name)
    if not others:
        return "there is no other checkpoint beside it: train anew, without --resume"
    return f"beside it are {', '.join(others)}: write one's name into last_checkpoint to resume from there"


def check_initial_weights(path: str, incompatible: Any, model: nn.Module) -> None:
    """What MODEL.WEIGHTS gave the student. Heads may be missing (ImageNet's weights) or of another number of classes.

    Args:
        path: the file.
        incompatible: what fvcore's checkpointer could not match.
        model: the student.

    Raises:
        UserError: no weight fits, or the backbone's are those of another backbone.
    """
    misfits = [row for row in incompatible.incorrect_shapes if row[0].startswith("backbone.")]
    if misfits:
        name, found, expected = misfits[0]
        raise UserError(
            f"MODEL.WEIGHTS: {path} is of another backbone: {len(misfits)} of its weights have another shape, the "
            f"first is {name} with {tuple(found)}, expected {tuple(expected)}. MODEL.WEIGHTS is the student's start; "
            "a teacher's file is KD.TEACHER.WEIGHTS"
        )
    weights = model.state_dict().keys() & {name for name, _ in model.named_parameters()}  # not BatchNorm's counters
    if weights <= {*incompatible.missing_keys, *(name for name, *_ in incompatible.incorrect_shapes)}:
        unknown = ", ".join(list(incompatible.unexpected_keys)[:3])
        raise UserError(
            f"MODEL.WEIGHTS: {path} has not one of the student's {len(weights)} weights; its keys are {unknown} …: "
            "tools/convert_weights.py takes ResNets of torchvision and of timm"
        )
    deeper = [key for key in incompatible.unexpected_keys if key.startswith("backbone.")]
    if deeper:
        logger.warning(
            "MODEL.WEIGHTS: %s has %d weights of a backbone that the student has no place for, the first is %s. Is it "
            "the teacher's file? MODEL.WEIGHTS is the student's start",
            path, len(deeper), deeper[0],
        )  # fmt: skip


def note_teachers_file(cfg: CfgNode) -> None:
    """Warn where the student starts from the very file that its teacher is loaded from."""
    teachers = {cfg.KD.TEACHER.WEIGHTS, *(weights for _, weights, *_ in cfg.KD.TEACHERS)}
    if distils(cfg.KD) and cfg.MODEL.WEIGHTS in teachers:
        logger.warning("MODEL.WEIGHTS: %s is the teacher's file, too: the student starts as it", cfg.MODEL.WEIGHTS)


def check_resumable(cfg: CfgNode) -> None:
    """Refuse to resume another run than that of the checkpoint in OUTPUT_DIR, by the config.yaml beside it.

    Raises:
        UserError: names the first key that differs, with both values.
    """
    path = config_file(cfg.OUTPUT_DIR)
    if not path.is_file() or not Path(cfg.OUTPUT_DIR, "last_checkpoint").is_file():
        return
    check_same_config(path, cfg, kd_defaults(), IGNORED_ON_RESUME, f"the run in OUTPUT_DIR {cfg.OUTPUT_DIR}")


def check_same_config(path: Path, now: Any, defaults: Any, ignored: Collection[str], source: str) -> None:
    """`check_same_run` with the config.yaml of a run; one that cannot be read, as after a kill, is not compared."""
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except yaml.YAMLError:
        saved = None
    if isinstance(saved, dict):
        check_same_run(saved, now, defaults, ignored, source)
    else:
        logger.warning("--resume: %s cannot be read, so it was not compared with this config", path)


def config_file(output_dir: str) -> Path:
    """Where detectron2 writes a training's whole config."""
    return Path(output_dir, "config.yaml")
