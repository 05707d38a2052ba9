#!/usr/bin/env python
"""Turn a data set in PASCAL VOC's layout into COCO json, one file per split.

    VOC_ROOT/Annotations/*.xml    VOC_ROOT/JPEGImages/*    VOC_ROOT/ImageSets/Main/*.txt

    python tools/voc_to_coco.py VOC_ROOT --split train --output my_train.json
    python tools/voc_to_coco.py VOC_ROOT --split val --output my_val.json

It prints the lines of the config that train on the result. Boxes without area are left out, boxes that reach out of
the image are cut; both are counted. Objects marked `difficult` become `iscrowd`, which is VOC's own rule: not trained
on, and a detection there is neither right nor wrong. Categories are sorted by name over all of Annotations/, so that
every split has the same.
"""

import argparse
import json
from pathlib import Path

import yaml

from kd_core.utils.errors import exit_on_user_error
from kd_core.utils.files import write_text
from kd_det.data.voc import VocDataset, to_coco


def config(name: str, json_file: Path, images: Path, num_classes: int) -> str:
    """The lines of a config that train on the result; paths may hold any character."""
    return yaml.safe_dump(
        {
            "DATASETS": {"REGISTER": [[name, str(json_file), str(images)]], "TRAIN": [name]},
            "MODEL": {"ROI_HEADS": {"NUM_CLASSES": num_classes}},
        },
        default_flow_style=None,
        width=1000,
        allow_unicode=True,
    )


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, metavar="VOC_ROOT", help="folder with Annotations, JPEGImages and ImageSets")
    parser.add_argument("--split", help="a list in ImageSets/Main, such as train (default: every annotation file)")
    parser.add_argument("--output", type=Path, required=True, help="the json file to write")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="all categories, in this order (default: sorted)")
    parser.add_argument("--keep-difficult", action="store_true", help="treat difficult objects like any other")
    one_based = "boxes as in VOC's own devkit: pixels count from 1, xmax and ymax lie inside (default: edges, from 0)"
    parser.add_argument("--one-based", action="store_true", help=one_based)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    exit_on_user_error("voc_to_coco", lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> None:
    dataset = VocDataset(options.root, options.one_based)
    coco, counts = to_coco(dataset, options.split, options.classes, options.keep_difficult)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.output, json.dumps(coco))
    images, boxes, names = (len(coco[key]) for key in ("images", "annotations", "categories"))
    found = ", ".join(category["name"] for category in coco["categories"])
    print(f"{options.output}: {images} images, {boxes} boxes, {names} categories ({found})")
    print(f"left out, of zero area: {counts['zero_area']} boxes; cut at the image's edge: {counts['cut']}\n")
    print(config(options.output.stem, options.output.resolve(), (options.root / "JPEGImages").resolve(), names))


if __name__ == "__main__":
    main()
