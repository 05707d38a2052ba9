#!/usr/bin/env python
"""Where the time of a training step goes: a table by part of the step, the costliest operators, and a trace.

    tools/profile_step.py configs/Digits/deepkd.yaml KD.TEACHER.ALLOW_RANDOM True KD.TEACHER.WEIGHTS ""
    tools/profile_step.py configs/Digits/cls_deepkd.yaml KD.TEACHER.ALLOW_RANDOM True --steps 20 --trace trace.json

Detection and classification configs alike. The trace opens in chrome://tracing and in Perfetto. `backward and the rest`
is the time outside the other rows: the backward passes and the Python around them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.hooks import RemovableHandle

from kd_core.utils.config import read_yaml
from kd_core.utils.errors import exit_on_user_error

PREFIX = "part: "
HEADS = ("roi_heads", "head", "sem_seg_head")
TEACHERS_HEADS = ("box_pooler", "box_head", "cls_subnet", "predictor")  # in HEADS, whose forward a teacher may not run
Parts = dict[str, nn.Module]


def main(arguments: list[str] | None = None) -> str:
    """The command; returns the table of parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a yaml of configs/, or your own")
    parser.add_argument("--steps", type=int, default=5, help="steps that are profiled, after two that are not")
    parser.add_argument("--trace", type=Path, default=Path("output/profile/trace.json"), help="default: %(default)s")
    parser.add_argument("--operators", type=int, default=12, help="how many operators to list")
    parser.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys to override")
    args = parser.parse_intermixed_args(arguments)
    build = classification_step if "DATA" in read_yaml(args.config) else detection_step
    with build(args.config, args.options) as (step, parts):
        for _ in range(2):
            step()
        wait()
        with marked(parts), profile(activities=activities()) as profiled:
            start = time.perf_counter()
            for _ in range(args.steps):
                step()
            wait()
            seconds = (time.perf_counter() - start) / args.steps
    args.trace.parent.mkdir(parents=True, exist_ok=True)
    profiled.export_chrome_trace(str(args.trace))
    text = table(profiled, args.steps, seconds)
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=order, row_limit=args.operators, max_name_column_width=40))
    print(f"\n{text}\n\nTrace: {args.trace}")
    return text


@contextmanager
def detection_step(config: str, options: list[str]) -> Iterator[tuple[Callable[[], object], Parts]]:
    """The iteration of a detection config, and the modules that are its parts."""
    from kd_det.analysis.iteration import build_iteration
    from kd_det.engine.launch import choose_device, read_config

    cfg = read_config(config, options)
    choose_device(cfg, num_gpus=1)
    iteration = build_iteration(cfg)
    model = iteration.model
    parts = parts_of(model, "student", "backbone", "proposal_generator", *HEADS)
    teachers = [teacher.model for teacher in getattr(model, "teachers", ())]
    for index, teacher in enumerate(teachers):
        owner = f"teacher {index}" if len(teachers) > 1 else "teacher"
        for part in (teacher, *parts_of(teacher, owner, *HEADS).values()):
            parts |= parts_of(part, owner, "backbone", *TEACHERS_HEADS)
    if getattr(model, "loss", None) is not None:
        parts["distillation loss"] = model.loss
    yield iteration, parts


def parts_of(module: nn.Module, owner: str, *names: str) -> Parts:
    """Those modules of `names` that a module has."""
    return {f"{owner} {name}": getattr(module, name) for name in names if hasattr(module, name)}


@contextmanager
def classification_step(config: str, options: list[str]) -> Iterator[tuple[Callable[[], object], Parts]]:
    """The training step of a classification config on one batch, and the modules that are its parts."""
    from kd_cls.build import build_trainer
    from kd_cls.config import load_cfg
    from kd_cls.distributed import start_process

    cfg = load_cfg(config, options)
    with start_process(cfg.DEVICE) as process:
        trainer = build_trainer(cfg, process)
        task = trainer.task.train()
        images, target = next(iter(trainer.loaders.train))
        indices = trainer.loaders.train.sampler.order(0)[: len(images)]
        parts: Parts = {"student": task.trainable_module, "task loss": task.criterion}
        taught = {"teacher": task.teacher, "distillation loss": task.distillation}  # a feature loss may be alone
        parts |= {name: module for name, module in taught.items() if module is not None}
        yield lambda: trainer.step(images, target, 0, indices), parts


@contextmanager
def marked(parts: Parts) -> Iterator[None]:
    """Mark the forward pass of each part as a range in the profile."""
    handles = [handle for name, module in parts.items() for handle in mark(PREFIX + name, module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mark(name: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Open a range before a module's forward pass and close it after."""
    stack: list[record_function] = []

    def enter(*_: object) -> None:
        stack.append(record_function(name))
        stack[-1].__enter__()

    return (
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(lambda *_: stack.pop().__exit__(None, None, None), always_call=True),
    )


def table(profiled: profile, steps: int, seconds: float) -> str:
    """Milliseconds of a step in each part, and its share."""
    times = {}
    clock = "device_time_total" if torch.cuda.is_available() else "cpu_time_total"  # a launch is not its kernel
    for event in profiled.key_averages():
        if event.key.startswith(PREFIX):
            times[event.key.removeprefix(PREFIX)] = getattr(event, clock) / 1e3 / steps
        elif event.key.startswith("Optimizer.step"):
            times["optimizer step"] = getattr(event, clock) / 1e3 / steps
    total = 1e3 * seconds
    times["backward and the rest"] = total - sum(times.values())
    rows = [[name, ms, f"{100 * ms / total:.1f} %"] for name, ms in [*times.items(), ("step", total)]]
    return tabulate(rows, ["part", "ms", "share"], tablefmt="github", floatfmt=".2f")


def activities() -> list[ProfilerActivity]:
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def wait() -> None:
    """Wait for the device to finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    exit_on_user_error("profile_step", main)
