"""Measures one step of a training, and estimates the whole schedule from it."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from kd_core.utils.latency import wait_for_device
from kd_det.engine.trainer import DistillationTrainer


@dataclass(frozen=True)
class Estimate:
    """The cost of a step of one image, and of the schedule on the same device.

    Attributes:
        losses: of the step.
        parameters: of the student; `trained`, those that are not frozen; `teacher`, of its teachers.
        step_seconds: forward, backward and update with one image.
        fixed_bytes: weights of student and teachers, gradients, and the optimizer's buffers.
        image_bytes: what a step needs besides for one image: activations, the teacher's features.
        checkpoint_bytes: size of a checkpoint.
        total_seconds, process_bytes, disk_bytes: of the whole schedule; time and memory are proportional to the images.
        epochs: how often every image is seen; None where other data replaces the training set.
    """

    losses: dict[str, float]
    parameters: int
    trained: int
    teacher: int
    step_seconds: float
    fixed_bytes: int
    image_bytes: int
    checkpoint_bytes: int
    total_seconds: float
    process_bytes: int
    disk_bytes: int
    epochs: float | None


def measure(cfg: CfgNode, world_size: int, stands_in: bool) -> Estimate:
    """Build everything that `cfg` describes, take two steps of one image, and measure the second.

    One image, because a whole batch of a large detector may not fit into this machine. The schedule is estimated as
    IMS_PER_BATCH / `world_size` such images per iteration, without evaluation; its memory as one micro-batch.
    """
    with tempfile.TemporaryDirectory() as output:
        trainer = DistillationTrainer(one_image(cfg, output))
        if cfg.MODEL.WEIGHTS:
            trainer.resume_or_load(resume=False)
        with EventStorage() as trainer.storage:
            trainer.iter = 0
            trainer.model.train()
            with peak_memory(trainer.model) as peak:
                trainer.run_step()
                wait_for_device(trainer.model)
                start = time.perf_counter()
                trainer.run_step()
                wait_for_device(trainer.model)
                seconds = time.perf_counter() - start
            losses = {name: value for name, (value, _) in trainer.storage.latest().items() if "loss" in name}
    return estimate(cfg, trainer, world_size, seconds, peak[0], losses, stands_in)


def one_image(cfg: CfgNode, output: str) -> CfgNode:
    """`cfg` with steps of one image in one process, which write only to `output`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.ACCUMULATE_STEPS, cfg.SOLVER.REFERENCE_WORLD_SIZE = 1, 1, 0
    cfg.DATALOADER.NUM_WORKERS, cfg.DATASETS.TEST, cfg.OUTPUT_DIR, cfg.WANDB.ENABLED = 0, (), output, False
    return cfg


def estimate(
    cfg: CfgNode,
    trainer: DistillationTrainer,
    world_size: int,
    seconds: float,
    peak: int,
    losses: dict[str, float],
    stands_in: bool,
) -> Estimate:
    """The schedule's cost from a step's."""
    model, solver = trainer.checkpointer.model, cfg.SOLVER
    teachers = [teacher.model for teacher in getattr(model, "teachers", [])]
    weights, buffers = tensors_bytes(model.state_dict()), tensors_bytes(trainer._trainer.optimizer.state_dict())
    images = solver.IMS_PER_BATCH / world_size
    gradients = tensors_bytes([p for p in model.parameters() if p.requires_grad])
    if hasattr(trainer._trainer.optimizer, "gradients"):  # a copy for each set of streams, and their sum
        gradients = max(gradients, tensors_bytes(trainer._trainer.optimizer.gradients.tensors()))
    average = tensors_bytes(trainer.average.state_dict()) if trainer.average else 0
    fixed = weights + average + gradients + buffers + sum(tensors_bytes(teacher.state_dict()) for teacher in teachers)
    image = max(peak - gradients - buffers, 0)  # the measured steps made these too
    checkpoint = weights + average + buffers
    best = weights + average  # a file each
    return Estimate(
        losses,
        count(model),
        count(model, trained=True),
        sum(map(count, teachers)),
        seconds,
        fixed,
        image,
        checkpoint,
        total_seconds=solver.MAX_ITER * images * seconds,
        process_bytes=round(fixed + image * images / max(solver.ACCUMULATE_STEPS, 1)),  # 0 is a finding, not the end
        disk_bytes=checkpoint * (solver.MAX_ITER // solver.CHECKPOINT_PERIOD + 1) + best,
        epochs=None if stands_in else solver.MAX_ITER * solver.IMS_PER_BATCH / len(trainer.loader.dataset),
    )


def count(model: nn.Module, trained: bool = False) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


def tensors_bytes(tree: object) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return sum(map(tensors_bytes, children))


@contextmanager
def peak_memory(model: nn.Module) -> Iterator[list[int]]:
    """Peak bytes of the block beyond those in use when it began: of CUDA, or of the process on the CPU."""
    device, peak = next(model.parameters()).device, [0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak[0] = torch.cuda.max_memory_allocated(device) - before
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # from now on VmHWM counts anew
    before = process_memory("VmRSS")
    yield peak
    peak[0] = max(process_memory("VmHWM") - before, 0)


def process_memory(field: str) -> int:
    """Bytes of this process, VmRSS now or VmHWM at most; 0 where the system does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    return 0
