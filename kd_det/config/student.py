"""The trained student's own config: what plain detectron2 builds it from."""

from pathlib import Path

from detectron2.config import CfgNode, get_cfg

from kd_core.utils.files import write_text
from kd_det.config.defaults import add_timm_config
from kd_det.modeling.meta_arch.registry import plain_name

# First line of a student's config whose backbone is timm's: detectron2 refuses keys that it does not know.
TIMM_NOTE = "# Its backbone is timm's: before merging this file, import kd_det and call kd_det.add_timm_config(cfg).\n"


def student_config(cfg: CfgNode) -> CfgNode:
    """`cfg` without the keys of ours that plain detectron2 would refuse: a plain meta-architecture, the final weights.

    MODEL.TIMM stays where the backbone is built from it.
    """
    plain = get_cfg()
    if cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone":
        add_timm_config(plain)
    copy_shared(plain_config(cfg), plain)
    plain.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    return plain


def write_student(plain: CfgNode, path: Path) -> None:
    """Write the yaml of a `student_config`, whole or not at all; its first line tells of a backbone of timm's."""
    write_text(path, (TIMM_NOTE if "TIMM" in plain.MODEL else "") + plain.dump())


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
