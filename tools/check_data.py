#!/usr/bin/env python
"""Check a data set before a long training on it.

    tools/check_data.py configs/Digits/dkd.yaml                       # DATASETS.TRAIN and TEST of a detector's config
    tools/check_data.py my_classifier.yaml                            # DATA.NAME and ROOT of a classifier's config
    tools/check_data.py train.json train_images val.json val_images   # COCO json files, each with its image folder
    tools/check_data.py my_classes                                    # a folder with train/<class>/ and val/<class>/
    tools/check_data.py tiny-imagenet-200 --name tiny_imagenet        # another data set of kd_cls (DATA.NAME)
    tools/check_data.py train.json train_images --output cleaned.json # and write a copy without the faulty entries

Every image is there, decodes, and has the size that the json says; every box has an area and lies in its image; ids
are unique and categories known; no image is in two splits. For semantic segmentation, every image has a label map of
its size that holds no id but those of classes and ignored pixels.

It names the first places of each kind of problem and their count, and exits with status 1 if there is any. Remarks do
not change the status.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_core.utils.config import find_config, read_yaml
from kd_core.utils.data_check import DataReport
from kd_core.utils.errors import UserError, exit_on_user_error
from kd_core.utils.files import write_text


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="a config, JSON IMAGES pairs, or a folder of classes")
    parser.add_argument("--output", type=Path, help="write a copy of the (one) json without the faulty entries")
    parser.add_argument("--name", default="folder", help="which data set of kd_cls a folder holds (default: folder)")
    parser.add_argument("--workers", type=int, default=0, help="threads that decode (default: one per core)")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    wrong = exit_on_user_error("check_data", lambda: check(parse(arguments)))
    print(f"{wrong} problem{'s' * (wrong != 1)}" if wrong else "nothing is wrong")
    return 1 if wrong else 0


def check(args: argparse.Namespace) -> int:
    """Check what the arguments name, and print what is found; returns the number of problems."""
    if args.output and not args.output.absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}")
    first = Path(args.data[0])
    if first.suffix in (".yaml", ".yml"):
        return check_config(str(first), args.data[1:], args)
    if first.is_dir() and len(args.data) == 1:
        return check_classes(args.name, first, args)
    if len(args.data) % 2:
        raise UserError(f"{' '.join(args.data)}: expected a config, a folder of classes, or JSON IMAGES pairs")
    return check_json_files(list(zip(args.data[::2], args.data[1::2], strict=True)), args)


def check_config(path: str, options: list[str], args: argparse.Namespace) -> int:
    """The data of a classifier's or a detector's config."""
    if Path(find_config(path)).is_file() and "DATA" in read_yaml(path):
        from kd_cls.config import load_cfg

        data = load_cfg(path, options).DATA
        return check_classes(data.NAME, data.ROOT, args)
    return check_detection(path, options, args)


def check_classes(name: str, root: str | Path, args: argparse.Namespace) -> int:
    """A data set of kd_cls."""
    from kd_cls.data.check import check_images

    if args.output:
        raise UserError(f"--output writes a COCO json, and {args.data[0]} is a data set of classes")
    report, found = check_images(name, root, args.workers)
    print(found)
    return print_report(report)


def check_detection(path: str, options: list[str], args: argparse.Namespace) -> int:
    """DATASETS.TRAIN and TEST of a detector's config: COCO json files, label maps, or both, as its model needs."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from kd_det.data import prepare_digits, register_datasets
    from kd_det.data.check import coco_paths, label_maps_of
    from kd_det.data.register import check_on_disk
    from kd_det.engine.launch import read_config
    from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys

    cfg = read_config(path, options)
    register_datasets(cfg)
    json_files, label_maps = [], []
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if name not in DatasetCatalog:
            raise UserError(f"{path}: no data set is called {name!r}: add it with DATASETS.REGISTER")
        if name.startswith("digits_"):
            prepare_digits()
        check_on_disk(path, name)
        metadata = MetadataCatalog.get(name)
        if paths := coco_paths(name):
            json_files.append(paths)
        elif not metadata.get("sem_seg_root", metadata.get("gt_dir")):
            raise UserError(f"{path}: {name} has neither a COCO json nor label maps, so it cannot be checked")
        if PIXEL_CLASSES in class_keys(cfg.MODEL.META_ARCHITECTURE):
            label_maps.append(label_maps_of(name, cfg.MODEL.SEM_SEG_HEAD))
    wrong = check_json_files(json_files, args) if json_files else 0
    return wrong + (check_label_maps(label_maps, args) if label_maps else 0)


def check_label_maps(splits: list[Any], args: argparse.Namespace) -> int:
    """Images with label maps: `LabelMaps` of kd_det.data.check."""
    from kd_det.data import check

    together, wrong = check.check_label_maps(splits, args.workers), 0
    for split in splits:
        print(f"{split.name}: {len(split.pairs)} images with label maps")
        wrong += print_report(split.report)
    return wrong + print_report(together)


def check_json_files(splits: list[tuple[str, str]], args: argparse.Namespace) -> int:
    """COCO json files with their image folders."""
    from kd_det.data.check import check_coco

    if args.output and len(splits) != 1:
        raise UserError(f"--output writes one json, but {len(splits)} were given: clean them one at a time")
    (files, together), wrong = check_coco(splits, args.workers), 0
    for file in files:
        content = file.content
        counts = ", ".join(f"{len(content[key])} {key}" for key in ("images", "annotations", "categories"))
        print(f"{file.json_file}: {counts}")
        wrong += print_report(file.report)
    if args.output:
        cleaned = files[0].cleaned()
        write_text(args.output, json.dumps(cleaned))
        print(f"{args.output}: {len(cleaned['images'])} images, {len(cleaned['annotations'])} annotations")
    return wrong + print_report(together)


def print_report(report: DataReport) -> int:
    """Print what a report says; returns the number of its problems."""
    for line in report.lines():
        print(f"  {line}")
    return sum(map(len, report.problems.values()))


if __name__ == "__main__":
    sys.exit(main())
