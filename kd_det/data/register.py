"""Data sets named in a config: the user's own are registered, and all of them are checked before a training."""

import difflib
import json
import os
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.file_io import PathManager

from kd_core.utils.config import lookup
from kd_core.utils.errors import UserError
from kd_det.data.builtin import datasets_root, is_builtin
from kd_det.data.check import refuse_broken
from kd_det.data.label_maps import label_map_records
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys

REGISTER_FORM = "DATASETS.REGISTER is a list of [name, json file, image folder]"
# In the metadata of detectron2's data sets.
PATHS = ("json_file", "image_root", "sem_seg_root", "panoptic_root", "panoptic_json", "image_dir", "gt_dir", "dirname")


def register_datasets(cfg: CfgNode) -> None:
    """Register the data sets of `DATASETS.REGISTER` and `DATASETS.REGISTER_SEM_SEG`; it may be called again.

    `DATASETS.REGISTER` is a list of [name, json file, image folder]. Relative paths start at $DETECTRON2_DATASETS
    (./datasets where that is not set), as those of detectron2's own data sets do; `~` is the home folder.

    Raises:
        UserError: an entry of another form; a name that belongs to a data set with other paths.
    """
    for entry in cfg.DATASETS.REGISTER:
        name, json_file, image_root = _parsed(entry)
        if name in DatasetCatalog:
            _refuse_other_paths(name, json_file, image_root)
        else:
            register_coco_instances(name, {}, json_file, image_root)
    for entry in cfg.DATASETS.REGISTER_SEM_SEG:
        name, images, labels, classes = _parsed_sem_seg(entry)
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, partial(label_map_records, images, labels))
        elif [MetadataCatalog.get(name).get(key) for key in ("image_root", "sem_seg_root")] != [images, labels]:
            raise UserError(f"DATASETS.REGISTER_SEM_SEG: {name} is already a data set with other folders: rename it")
        MetadataCatalog.pop(name, None)  # the classes may have other names now
        MetadataCatalog.get(name).set(
            image_root=images,
            sem_seg_root=labels,
            evaluator_type="sem_seg",
            ignore_label=cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
            stuff_classes=classes,
        )


def check_datasets(cfg: CfgNode, keys: Iterable[str] = ("TRAIN", "TEST")) -> None:
    """Check that every data set in `DATASETS.<key>` is known, is on disk, and has the classes that the model predicts.

    Raises:
        UserError: names the key, the data set, and the path or number that is wrong.
    """
    for key in keys:
        for name in cfg.DATASETS[key]:
            check_dataset(cfg, key, name)
    check_same_classes(cfg, keys)


def check_dataset(cfg: CfgNode, key: str, name: str) -> None:
    """`check_datasets` for one data set of `DATASETS.<key>`."""
    key = f"DATASETS.{key}"
    _check_known(key, name)
    check_on_disk(key, name)
    _check_content(key, name)
    for number in class_keys(cfg.MODEL.META_ARCHITECTURE):
        classes = _class_names(key, name, number)
        if classes is not None:
            _check_number(cfg, key, name, len(classes), number)


def check_same_classes(cfg: CfgNode, keys: Iterable[str] = ("TRAIN", "TEST")) -> None:
    """Refuse data sets with other classes than the first, or in another order; unknown data sets are passed over."""
    first: tuple[str, list[str]] | None = None
    named = [(key, name) for key in keys for name in cfg.DATASETS[key]]
    number = class_keys(cfg.MODEL.META_ARCHITECTURE)[0]
    for key, name in named:
        classes = _class_names(f"DATASETS.{key}", name, number) if name in DatasetCatalog else None
        if classes is None:
            continue
        first = first or (name, classes)
        if classes != first[1]:
            raise UserError(
                f"DATASETS.{key}: {name} has not the classes of {first[0]} in their order: {classes}, {first[1]}"
            )


def _parsed(entry: Any) -> tuple[str, str, str]:
    is_triple = isinstance(entry, list | tuple) and len(entry) == 3
    if not is_triple or not all(isinstance(part, str) and part for part in entry):
        raise UserError(f"{REGISTER_FORM}, but one entry is {entry!r}")
    name, *paths = entry
    json_file, image_root = (_resolved(path) for path in paths)
    return name, json_file, image_root


def _parsed_sem_seg(entry: Any) -> tuple[str, str, str, list[str]]:
    is_list = isinstance(entry, list | tuple) and len(entry) >= 5
    if not is_list or not all(isinstance(part, str) and part for part in entry):
        raise UserError(
            "DATASETS.REGISTER_SEM_SEG is a list of [name, image folder, label folder, class 0, class 1, …] of at "
            f"least two classes, but one entry is {entry!r}"
        )
    name, images, labels, *classes = entry
    return name, _resolved(images), _resolved(labels), classes


def _resolved(path: str) -> str:
    if "://" in path:
        return path
    return str(datasets_root() / Path(path).expanduser())  # an absolute path stays what it is


def _refuse_other_paths(name: str, json_file: str, image_root: str) -> None:
    metadata = MetadataCatalog.get(name)
    registered = metadata.get("json_file"), metadata.get("image_root")
    if registered != (json_file, image_root):
        raise UserError(
            f"DATASETS.REGISTER: {name} is already a data set with json file {registered[0]} and image folder "
            f"{registered[1]}; give the one with {json_file} and {image_root} another name"
        )


def _check_known(key: str, name: str) -> None:
    if name in DatasetCatalog:
        return
    near = difflib.get_close_matches(name, DatasetCatalog.list(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "no registered name is similar."
    raise UserError(f"{key}: no data set is called {name!r}; {hint} {REGISTER_FORM}, for your own")


def check_on_disk(key: str, name: str) -> None:
    """Raise a UserError where a file or folder of the data set `name` is not there; `key` names it."""
    if is_builtin(name):
        return  # written when it is first loaded
    metadata = MetadataCatalog.get(name)
    for field in PATHS:
        path = metadata.get(field)
        if path and not PathManager.exists(path):
            raise UserError(
                f"{key}: {name} is not on disk: its {field} {path} does not exist. "
                f"DETECTRON2_DATASETS, where relative paths start, is {datasets_root().absolute()}"
            )


def _check_content(key: str, name: str) -> None:
    """Refuse a local COCO json whose structure would stop the training, or whose images are not there."""
    metadata = MetadataCatalog.get(name)
    json_file, image_root = metadata.get("json_file"), metadata.get("image_root")
    if json_file and image_root and os.path.isfile(json_file):
        refuse_broken(key, name, json_file, image_root)


def _class_names(key: str, name: str, number: str) -> list[str] | None:
    """From detectron2's metadata or else from the json file; None where neither says. `number` is the model's key."""
    metadata = MetadataCatalog.get(name)
    if number == PIXEL_CLASSES:
        if metadata.get("sem_seg_root", metadata.get("gt_dir")) is None:
            raise UserError(
                f"{key}: {name} has no label maps, from which this MODEL.META_ARCHITECTURE learns; name a data set "
                "that has them, or add your own with DATASETS.REGISTER_SEM_SEG"
            )
        return metadata.get("stuff_classes")
    classes, json_file = metadata.get("thing_classes"), metadata.get("json_file")
    if classes is not None or json_file is None or not PathManager.exists(json_file):
        return classes
    try:
        local = PathManager.get_local_path(json_file)
        return _names_in(local, os.stat(local).st_mtime_ns)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key}: {json_file} of {name} is not a COCO annotation file: {error!r}") from error


@lru_cache
def _names_in(json_file: str, _modified: int) -> list[str]:
    """The class names in a COCO json, in the order of their ids; a large file is read once for all checks."""
    categories = json.loads(Path(json_file).read_bytes())["categories"]
    return [category["name"] for category in sorted(categories, key=lambda category: category["id"])]


def _check_number(cfg: CfgNode, key: str, name: str, found: int, number: str) -> None:
    configured = lookup(cfg, number)
    if found != configured:
        raise UserError(f"{key}: {name} has {found} classes: {number} {configured} does not fit, set it to {found}")
