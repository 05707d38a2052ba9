#!/usr/bin/env python
"""Before a long training: is everything there, does it build, does it step, and what will it cost?

    tools/dry_run.py configs/COCO/deepkd_r18_r101.yaml
    tools/dry_run.py configs/COCO/deepkd_r18_r101.yaml --num-gpus 8 SOLVER.IMS_PER_BATCH 16
    tools/dry_run.py configs/Digits/dkd.yaml KD.TEACHER.WEIGHTS my/teacher.pth

It lists everything that is missing or wrong, not the first thing only, and exits with status 1 if there is any. Then
it builds student, teacher and optimizer and takes two steps of one image on the GPU, or on the CPU where there is none,
and times the second. What is missing is replaced, and it says so: data by the built-in digits, enlarged to the size
that the config trains at, weights by random ones. Time and memory hardly depend on either.

The estimate is of this machine's device: SOLVER.MAX_ITER iterations of IMS_PER_BATCH / processes images, without
evaluation and waiting for data. Weights with a scheme (detectron2://, https://) are named, not fetched. Every image and
label map is decoded, which takes minutes for COCO; --no-images leaves that out. Nothing is written, except the digits
where they are used.
"""

import argparse
import logging
import sys
import warnings
from dataclasses import dataclass

import torch

from kd_core.utils.errors import exit_on_user_error
from kd_det.analysis.cost import Estimate, measure
from kd_det.analysis.findings import STAND_IN, Findings, collect_problems, unreadable_images
from kd_det.engine.launch import choose_device, read_config

UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"), (0, "seconds"))


@dataclass(frozen=True)
class Machine:
    """The processes that the estimate is for."""

    world_size: int
    device: str


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config_file", metavar="CONFIG", help="a yaml file, as of tools/train_net.py")
    parser.add_argument("--num-gpus", type=int, default=None, help="processes to estimate for (default: the GPUs here)")
    parser.add_argument("--no-images", action="store_true", help="do not decode the images")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override")
    return parser.parse_intermixed_args(arguments)


def listed(title: str, lines: list[str]) -> None:
    """Print a numbered list, unless it is empty."""
    if lines:
        print(f"{title}:")
        print("\n".join(f"  {number}. {line}" for number, line in enumerate(lines, start=1)))


def duration(seconds: float) -> str:
    """In the largest unit that it fills."""
    size, name = next((size, name) for size, name in UNITS if seconds >= size)
    return f"{seconds / (size or 1):.1f} {name}"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def report(found: Findings, cost: Estimate, machine: Machine) -> None:
    """The estimate in five lines."""
    solver = found.runnable.SOLVER
    frozen = cost.parameters - cost.trained
    teacher = f", teacher {cost.teacher / 1e6:.2f} M" if cost.teacher else ""
    print(f"built: student {cost.parameters / 1e6:.2f} M parameters, {frozen / 1e6:.2f} M of them frozen{teacher}")
    terms = ", ".join(f"{name} {value:.3g}" for name, value in sorted(cost.losses.items()) if name != "total_loss")
    print(f"one step of one image: {cost.step_seconds:.2f} s on {machine.device}; {terms}")
    epochs = "" if cost.epochs is None else f" ({cost.epochs:.1f} epochs)"
    print(
        f"schedule: {solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{epochs} by {machine.world_size} such "
        f"process{'es' if machine.world_size > 1 else ''}: about {duration(cost.total_seconds)}"
    )
    print(
        f"memory: about {gigabytes(cost.process_bytes)} a process: {gigabytes(cost.fixed_bytes)} for weights, "
        f"gradients and optimizer, {gigabytes(cost.image_bytes)} an image"
    )
    print(f"disk: about {gigabytes(cost.disk_bytes)}, in checkpoints of {gigabytes(cost.checkpoint_bytes)}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    options = parse_arguments(arguments)
    cfg = exit_on_user_error("dry_run", lambda: read_config(options.config_file, options.options))
    choose_device(cfg, torch.cuda.device_count())
    gpus = torch.cuda.device_count() if options.num_gpus is None else options.num_gpus
    on_gpu = cfg.MODEL.DEVICE != "cpu"
    device = torch.cuda.get_device_name() if on_gpu else f"the CPU ({torch.get_num_threads()} threads)"
    machine = Machine(max(gpus, 1), device)
    print(f"{options.config_file} for {machine.world_size} process{'es' if gpus > 1 else ''}")
    found = collect_problems(cfg, machine.world_size)
    found.missing += [] if options.no_images else unreadable_images(cfg)
    cost = None
    warnings.filterwarnings("ignore", category=UserWarning)  # detectron2's, of torch's future
    try:
        logging.disable(logging.WARNING)  # what is worth knowing is in the report
        cost = measure(found.runnable, machine.world_size, STAND_IN in found.runnable.DATASETS.TRAIN)
    except Exception as error:  # whatever would have stopped the training
        found.missing.append(f"it does not build or step: {type(error).__name__}: {error}")
    finally:
        logging.disable(logging.NOTSET)
    listed("MISSING OR WRONG", found.missing)
    listed("fetched when training starts, and not looked at", found.to_fetch)
    listed("stood in for here", found.stood_in)
    if cost is not None:
        report(found, cost, machine)
    if found.missing:
        print(f"{len(found.missing)} missing or wrong: training would not start, or would stop half-way")
    else:
        print("nothing is missing" + (", but the images were not decoded" if options.no_images else ""))
    return 1 if found.missing else 0


if __name__ == "__main__":
    sys.exit(main())
