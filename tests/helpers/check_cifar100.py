"""Every method on real CIFAR-100 images, briefly.

    python tests/helpers/check_cifar100.py FOLDER [--images 5000] [--epochs 2] [--val-images 2000]

FOLDER holds the lossless strips that cifar100_reader.py reads. Trains resnet32x4, then resnet8x4 by every method, with
the configs of configs/CIFAR100 but for the length; evaluates each student by kd_cls.evaluate and by plain timm, which
must agree on every image; prints a table. What is finished is not repeated. Not a test: it takes an hour on two cores.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

from kd_cls.evaluate import main as evaluate
from kd_cls.train import main as train

HERE = Path(__file__).resolve().parent

METHODS = {
    "plain": ("baseline_resnet8x4", []),
    "KD": ("kd_resnet32x4_resnet8x4", []),
    "DKD": ("dkd_resnet32x4_resnet8x4", []),
    "GDKD": ("gdkd_resnet32x4_resnet8x4", []),
    "GDKD3": ("gdkd_resnet32x4_resnet8x4", ["KD.LOSS.NAME", "gdkd3"]),
    "AEKT": ("aekt_resnet32x4_resnet8x4", []),
    "DOT": ("dot_resnet32x4_resnet8x4", []),
    "DeepKD over KD": ("deepkd_kd_resnet32x4_resnet8x4", []),
    "DeepKD over DKD": ("deepkd_resnet32x4_resnet8x4", []),
}


def register_strips() -> None:
    """Make DATA.NAME cifar100_strips known."""
    spec = importlib.util.spec_from_file_location("cifar100_reader", HERE / "cifar100_reader.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def run(config: str, output: Path, words: list[str]) -> None:
    """Train once; a finished run only reports."""
    train(["--config-file", f"configs/CIFAR100/{config}.yaml", "--resume", "OUTPUT_DIR", str(output), *words])


def correct_by_timm(checkpoint: Path, folder: str, val_images: int) -> int:
    """How many validation images plain timm classifies rightly, in a process that imports the registration alone."""
    command = [sys.executable, str(HERE / "plain_timm.py"), str(checkpoint), folder, str(val_images)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def losses(output: Path) -> list[dict[str, float]]:
    """The training lines of metrics.json."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    return [line for line in lines if "task" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--val-images", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("output/check_cifar100"))
    options = parser.parse_args()
    register_strips()
    words = ["DATA.NAME", "cifar100_strips", "DATA.ROOT", options.folder, "DATA.TRAIN_IMAGES", str(options.images)]
    words += ["SOLVER.EPOCHS", str(options.epochs), "SOLVER.EVAL_PERIOD", str(options.epochs), "LOG_PERIOD", "10"]
    words += ["DATA.VAL_IMAGES", str(options.val_images), "DATA.NUM_WORKERS", "0", "SOLVER.CHECKPOINT_PERIOD", "25"]
    teacher = options.output / "teacher"
    run("teacher_resnet32x4", teacher, words)
    rows = []
    for name, (config, extra) in METHODS.items():
        output = options.output / name.replace(" ", "_").lower()
        own = [*words, *extra]
        if name != "plain":
            own += ["KD.TEACHER.WEIGHTS", str(teacher / "last.pth"), "KD.LOSS.WARMUP_EPOCHS", "0.5"]
            own += ["KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", str(options.output / "logits")]
        run(config, output, own)
        metrics = evaluate(["--config-file", str(output / "config.yaml"), "MODEL.WEIGHTS", str(output / "last.pth")])
        right = correct_by_timm(output / "last.pth", options.folder, options.val_images)
        assert round(metrics["top1"] * metrics["images"] / 100) == right, (name, metrics, right)
        first, last = losses(output)[0], losses(output)[-1]
        assert last["task"] < first["task"], name
        falls = f"{first['task']:.3f} → {last['task']:.3f}"
        rows.append(f"| {name} | {falls} | {metrics['top1']:.2f} | {right} / {options.val_images} |")
    table = [
        "| method | task loss, first and last 10 steps | top-1 | right by plain timm |",
        "|---|---|---|---|",
        *rows,
    ]
    print("\n".join(table))


if __name__ == "__main__":
    main()
