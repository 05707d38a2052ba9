#!/usr/bin/env python
"""Get the student alone out of a training: files that need nothing of this project.

    tools/export_student.py output/coco/dkd_r18_r101 --output exported             # plain detectron2: weights and yaml
    tools/export_student.py output/coco/dkd_r18_r101/model_best.pth --output exported
    tools/export_student.py output/coco/dkd_r18_r101 --output exported --torchscript --onnx

student.pth and student.yaml are a GeneralizedRCNN's, AEKT's layer merged, no teacher, no optimizer:

    cfg = detectron2.config.get_cfg(); cfg.merge_from_file("exported/student.yaml")
    detections = detectron2.engine.DefaultPredictor(cfg)(image)

student.ts is a trace, which needs torch and torchvision's operators only. Its input is one image (3, H, W), uint8 or
float, of 0 to 255, in the channel order and at the size that the student was trained for (INPUT.FORMAT,
INPUT.MIN_SIZE_TEST in student.yaml); boxes come in pixels of that image. Before it is written, it has detected in an
image of another size what the student detects.

    import torch, torchvision
    boxes, classes, scores, size = torch.jit.load("exported/student.ts")(image)

student.onnx, with the same input and outputs, is written where torch and detectron2 can (the package onnx is needed;
onnxruntime, where it is installed, checks it); else it is refused with the reason, and the other files are there.
"""

import argparse
import warnings
from pathlib import Path

from kd_core.utils.errors import exit_on_user_error
from kd_det.export import read_student, save_onnx, save_plain, save_torchscript


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a training's OUTPUT_DIR (its final weights, or its last checkpoint), or a .pth")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--config-file", help="default: student.yaml or config.yaml beside the checkpoint")
    parser.add_argument("--average", action="store_true", help="the moving average of the weights (SOLVER.EMA)")
    parser.add_argument("--torchscript", action="store_true", help="write student.ts, too")
    parser.add_argument("--onnx", action="store_true", help="write student.onnx, too")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    exit_on_user_error("export_student", lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # of tracing: what it makes constant is checked at another size
    student = read_student(options.source, options.config_file, options.average)
    options.output.mkdir(parents=True, exist_ok=True)
    weights, config = save_plain(student, options.output)
    count = sum(parameter.numel() for parameter in student.model.parameters())
    print(f"{weights}, {config}: {count / 1e6:.2f} M parameters, of {student.source}")
    for asked, name, save in (
        (options.torchscript, "student.ts", save_torchscript),
        (options.onnx, "student.onnx", save_onnx),
    ):
        if asked:
            print(f"{options.output / name}: image → {', '.join(save(student, options.output / name))}")


if __name__ == "__main__":
    main()
