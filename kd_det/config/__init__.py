"""Every config key of kd_det, and how files and options are merged into a config."""

from kd_core.utils.config import all_keys, lookup, merge_list
from kd_det.config.defaults import (
    add_kd_config,
    add_timm_config,
    build_box_loss,
    build_feature,
    build_logit_loss,
    kd_defaults,
)
from kd_det.config.files import merge_file, read_config

__all__ = [
    "add_kd_config",
    "add_timm_config",
    "all_keys",
    "build_box_loss",
    "build_feature",
    "build_logit_loss",
    "kd_defaults",
    "lookup",
    "merge_file",
    "merge_list",
    "read_config",
]
