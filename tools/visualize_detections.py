#!/usr/bin/env python
"""See what the student has learnt: ground truth, teacher and student side by side, one PNG per image.

    tools/visualize_detections.py output/digits/dkd --output pictures
    tools/visualize_detections.py output/coco/dkd_r18_r101 --output pictures --images 20 --threshold 0.7
    tools/visualize_detections.py output/digits/dkd/model_best.pth --output pictures --dataset digits_train
    tools/visualize_detections.py output/digits/dkd --output pictures KD.TEACHER.WEIGHTS my/teacher.pth

The first images of DATASETS.TEST are drawn, or of --dataset. The teacher is that of the training's config.yaml, which
KEY VALUE words override (relative paths start at the working folder); a plain training has none. No display is needed.
"""

import argparse
import warnings
from pathlib import Path

from kd_core.utils.errors import UserError, exit_on_user_error
from kd_det.engine.launch import choose_device, read_config
from kd_det.evaluation.visualize import draw_dataset, read_detectors, records_of
from kd_det.export import find_weights


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a training's OUTPUT_DIR (its final weights, or its last checkpoint), or a .pth")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dataset", help="default: the first of DATASETS.TEST")
    parser.add_argument("--images", type=int, default=8, help="how many (default: 8)")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score that is drawn (default: 0.5)")
    parser.add_argument("--no-teacher", action="store_true", help="ground truth and student only")
    parser.add_argument("--num-gpus", type=int, default=1, help="0: on the CPU (default: a GPU where there is one)")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser.parse_intermixed_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    exit_on_user_error("visualize_detections", lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    cfg = read_config(str(find_weights(Path(options.source)).with_name("config.yaml")), options.options)
    choose_device(cfg, options.num_gpus)
    if not options.dataset and not cfg.DATASETS.TEST:
        raise UserError("DATASETS.TEST is empty: give --dataset")
    records, metadata = records_of(cfg, options.dataset or cfg.DATASETS.TEST[0], options.images)
    detectors = read_detectors(options.source, cfg, with_teacher=not options.no_teacher)
    paths = draw_dataset(records, metadata, detectors, options.output, options.threshold)
    print(f"{len(paths)} pictures: {paths[0]} … {paths[-1].name}")


if __name__ == "__main__":
    main()
