"""The trained student's own config: what plain detectron2 builds it from."""

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from kd_core.utils.files import write_text
from kd_det.compat import add_deeplab_config
from kd_det.config.defaults import add_timm_config
from kd_det.modeling.meta_arch.registry import plain_name

# First lines of a student's config with keys that detectron2 does not know, and would refuse.
TIMM_NOTE = "# Its backbone is timm's: before merging this file, import kd_det and call kd_det.add_timm_config(cfg).\n"
DEEPLAB_NOTE = (
    "# Its head is DeepLab's: before merging this file, call detectron2.projects.deeplab.add_deeplab_config(cfg).\n"
)


def student_config(cfg: CfgNode) -> CfgNode:
    """`cfg` without the keys of ours that plain detectron2 would refuse: a plain meta-architecture, the final weights.

    MODEL.TIMM stays where the backbone is built from it.
    """
    plain = get_cfg()
    if "timm" in cfg.MODEL.BACKBONE.NAME:
        add_timm_config(plain)
    if uses_deeplab(cfg):
        add_deeplab_config(plain)
    copy_shared(plain_config(cfg), plain)
    plain.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    return plain


def write_student(plain: CfgNode, path: Path) -> None:
    """Write the yaml of a `student_config`, whole or not at all; its first lines tell of keys that are not plain."""
    notes = (TIMM_NOTE if "TIMM" in plain.MODEL else "") + (DEEPLAB_NOTE if uses_deeplab(plain) else "")
    write_text(path, notes + plain.dump())


def uses_deeplab(cfg: CfgNode) -> bool:
    """Whether a student is built by detectron2's DeepLab project, whose keys plain detectron2 has not of itself."""
    parts = (cfg.MODEL.SEM_SEG_HEAD.NAME, cfg.MODEL.BACKBONE.NAME, cfg.SOLVER.LR_SCHEDULER_NAME)
    return any(part.startswith("DeepLab") or "deeplab" in part or part == "WarmupPolyLR" for part in parts)


def copy_shared(source: CfgNode, target: CfgNode) -> None:
    """Copy the values of every key that both configs have."""
    for key, value in target.items():
        if isinstance(value, CfgNode):
            copy_shared(source[key], value)
        else:
            target[key] = source[key]


def plain_config(cfg: CfgNode) -> CfgNode:
    """What builds the student as detectron2's own class, keys of ours included (a backbone may read some)."""
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = plain_name(plain.MODEL.META_ARCHITECTURE)
    return plain
