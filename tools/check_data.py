#!/usr/bin/env python
"""Check a data set before a long training on it.

    tools/check_data.py configs/Digits/dkd.yaml                       # DATASETS.TRAIN and TEST of a detector's config
    tools/check_data.py train.json train_images val.json val_images   # COCO json files, each with its image folder
    tools/check_data.py my_classes                                    # a folder with train/<class>/ and val/<class>/
    tools/check_data.py tiny-imagenet-200 --name tiny_imagenet        # another data set of kd_cls (DATA.NAME)
    tools/check_data.py train.json train_images --output cleaned.json # and write a copy without the faulty entries

Every image is there, decodes, and has the size that the json says; every box has an area and lies in its image; ids
are unique and categories known; no image is in two splits. It names the first places of each kind of problem and their
count, and exits with status 1 if there is any. Remarks do not change the status.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tqdm import tqdm

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
    return exit_on_user_error("check_data", lambda: check(parse(arguments)))


def check(args: argparse.Namespace) -> int:
    """Check what the arguments name; 1 if anything is wrong with it."""
    first = Path(args.data[0])
    if first.suffix in (".yaml", ".yml"):
        return check_json_files(splits_of_config(str(first), args.data[1:]), args)
    if first.is_dir() and len(args.data) == 1:
        from kd_cls.data.check import check_images

        report, found = check_images(args.name, first, args.workers, progress)
        print(found)
        return conclude([report])
    if len(args.data) % 2:
        raise UserError(f"{' '.join(args.data)}: expected a config, a folder of classes, or JSON IMAGES pairs")
    return check_json_files(list(zip(args.data[::2], args.data[1::2], strict=True)), args)


def check_json_files(splits: list[tuple[str, str]], args: argparse.Namespace) -> int:
    """COCO json files with their image folders."""
    from kd_det.data.check import check_coco

    if args.output and len(splits) != 1:
        raise UserError(f"--output writes one json, but {len(splits)} were given: clean them one at a time")
    files, together = check_coco(splits, args.workers, progress)
    for file in files:
        content = file.content
        counts = ", ".join(f"{len(content[key])} {key}" for key in ("images", "annotations", "categories"))
        print(f"{file.json_file}: {counts}")
        print_report(file.report)
    if args.output:
        cleaned = files[0].cleaned()
        write_text(args.output, json.dumps(cleaned))
        print(f"{args.output}: {len(cleaned['images'])} images, {len(cleaned['annotations'])} annotations")
    return conclude([together], [file.report for file in files])


def splits_of_config(path: str, options: list[str]) -> list[tuple[str, str]]:
    """The json files and image folders of a detector's config."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from kd_det.data import prepare_digits, register_datasets
    from kd_det.engine.launch import read_config

    cfg = read_config(path, options)
    register_datasets(cfg)
    splits = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        if name not in DatasetCatalog:
            raise UserError(f"{path}: no data set is called {name!r}: add it with DATASETS.REGISTER")
        metadata = MetadataCatalog.get(name)
        if name.startswith("digits_"):
            prepare_digits()
        if metadata.get("json_file") is None or metadata.get("image_root") is None:
            print(f"{name} has no COCO json: not looked at")
            continue
        splits[name] = (metadata.json_file, metadata.image_root)
    return list(splits.values())


def progress(results: Iterable, total: int) -> Iterable:
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(results, total=total, unit="image", file=sys.stderr, leave=False, disable=not sys.stderr.isatty())


def print_report(report: DataReport) -> None:
    for line in report.lines():
        print(f"  {line}")


def conclude(reports: list[DataReport], printed: Sequence[DataReport] = ()) -> int:
    """Print what was not printed yet, and the verdict."""
    for report in reports:
        print_report(report)
    wrong = sum(len(places) for report in (*reports, *printed) for places in report.problems.values())
    print(f"{wrong} problem{'s' * (wrong != 1)}" if wrong else "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
