"""Reading a detection config: as `kd_core.utils.config` does it, and files of detectron2's older versions."""

import os
from pathlib import Path

import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode, downgrade_config, upgrade_config

from kd_core.utils.config import find_config, merge_list, merge_mapping, read_yaml
from kd_core.utils.errors import UserError
from kd_det.config.defaults import kd_defaults


def merge_file(cfg: CfgNode, path: str) -> None:
    """Merge a yaml file and its `_BASE_` files into `cfg`; a file with an older VERSION is upgraded.

    Raises:
        UserError: as `read_yaml` and `merge_mapping`; a VERSION that this detectron2 does not know; a LazyConfig; a
            classifier's config.
    """
    refuse_lazy(path)
    # Of the model zoo's files some compute their anchors by a yaml tag; they are code of the installed detectron2.
    zoo = Path(model_zoo.__file__).parent / "configs"
    values = read_yaml(path, CfgNode, trusted=Path(path).is_relative_to(zoo))
    if "DATA" in values:
        told = "python -m kd_cls.train trains it, python -m kd_cls.distill distils it"
        raise UserError(f"{path} is a classifier's config: {told}")
    version = values.get("VERSION", cfg.VERSION)
    if version == cfg.VERSION:
        return merge_mapping(cfg, values, path)
    if version not in range(1, cfg.VERSION):
        raise UserError(f"{path}: VERSION is {version!r}, but this detectron2 reads 1 to {cfg.VERSION}")
    old = downgrade_config(cfg, to_version=version)
    merge_mapping(old, values, path)
    upgraded = upgrade_config(old)
    cfg.clear()
    return cfg.update(upgraded)


def refuse_lazy(path: str) -> None:
    """Raise a UserError for a LazyConfig, or a yaml that one was written to. None of its code is run."""
    if path.endswith(".py"):
        raise UserError(f"{path} is a LazyConfig: tools/lazyconfig_train_net.py trains it")
    try:
        with open(find_config(path), encoding="utf-8") as file:
            root = yaml.compose(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # read_yaml says what is wrong
        return
    entries = root.value if isinstance(root, yaml.MappingNode) else []
    model = next((value for key, value in entries if key.value == "model"), None)
    if isinstance(model, yaml.MappingNode) and any(key.value == "_target_" for key, _ in model.value):
        raise UserError(
            f"{path} is of a LazyConfig: plain detectron2 builds its model as it is, by "
            f"instantiate(LazyConfig.load({path!r}).model); tools/lazyconfig_train_net.py trains one"
        )


def read_config(path: str, options: list[str]) -> CfgNode:
    """kd_det's defaults, the yaml file and the overrides of the command line, in that order."""
    cfg = kd_defaults()
    if not path:
        raise UserError("--config-file is missing: give one of configs/, or your own")
    if not os.path.isfile(find_config(path)):
        raise UserError(f"--config-file: there is no file {path}")
    merge_file(cfg, path)
    merge_list(cfg, options)
    return cfg
