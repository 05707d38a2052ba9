"""What a distillation costs, before it starts: parameters, GFLOPs, latency of both networks, and training time."""

import logging
import statistics
import time
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from fvcore.common.config import CfgNode
from fvcore.nn import FlopCountAnalysis
from torch import nn

from kd_cls.build import build_trainer
from kd_cls.data.build import build_data
from kd_cls.distributed import Process
from kd_cls.models.factory import build_student, input_stats
from kd_cls.task.teacher import build_teacher

logger = logging.getLogger("kd_cls")

STEPS, LATENCY_RUNS = 3, 5  # measured
COST_HEADERS = ["parameters", "GFLOPs", "ms / image"]


@dataclass(frozen=True)
class Cost:
    """What a network costs at inference on this machine."""

    parameters: int
    gflops: float | None  # of one image, multiply-adds; None if they cannot be counted
    seconds: float  # of one image, median


def on_trial(cfg: CfgNode, process: Process, processes: int) -> CfgNode:
    """A copy whose step is that of one process, with networks whose weights need not be ready yet."""
    trial = cfg.clone()
    trial.SOLVER.IMS_PER_BATCH = max(cfg.SOLVER.IMS_PER_BATCH // processes, 1)
    trial.KD.TEACHER.ALLOW_RANDOM, trial.KD.TEACHER.EVALUATE, trial.KD.TEACHER.CACHE = True, False, "none"
    trial.MODEL.WEIGHTS, trial.MODEL.PRETRAINED = "", False
    trial.DEVICE = str(process.device)
    return trial


def inference_costs(cfg: CfgNode, process: Process) -> dict[str, Cost]:
    """The costs of the teacher and of the student, each at the size of its images."""
    data = build_data(cfg)
    student = build_student(cfg, data.num_classes)
    stats = input_stats(cfg, student)
    teacher = build_teacher(cfg, data.num_classes, stats)
    return {
        "teacher": inference_cost(teacher.model, teacher.stats.size, process),
        "student": inference_cost(student, stats.size, process),
    }


def inference_cost(model: nn.Module, size: int, process: Process) -> Cost:
    """Parameters, multiply-adds and seconds of one image."""
    model, image = model.to(process.device).eval(), torch.rand(1, 3, size, size, device=process.device)
    times = []
    with torch.no_grad():
        for _ in range(LATENCY_RUNS + 1):  # the first one warms up
            start = time.perf_counter()
            model(image)
            if image.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        counter = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        try:
            gflops = counter.total() / 1e9
        except Exception as error:  # it traces the network: whatever the network does may fail there
            logger.debug("GFLOPs cannot be counted: %s", error)
            gflops = None
    return Cost(sum(p.numel() for p in model.parameters()), gflops, statistics.median(times[1:]))


def training_seconds(cfg: CfgNode, process: Process) -> float:
    """All iterations at the time of a few, measured; the first one warms up."""
    trainer = build_trainer(cfg, process)
    trainer.task.train()
    order = trainer.loaders.train.sampler.order(0).split(trainer.loaders.train.sampler.batch_size)
    times = [time.perf_counter()]
    for (images, target), indices in islice(zip(trainer.loaders.train, order, strict=True), STEPS + 1):
        trainer.step(images, target, 0, indices)
        if process.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    measured = [end - start for start, end in pairwise(times)]
    return trainer.max_iter * statistics.median(measured[1:] or measured)


def cost_cells(cost: Cost) -> list[str]:
    """A cost under `COST_HEADERS`."""
    gflops = "–" if cost.gflops is None else f"{cost.gflops:.3g}"
    return [f"{cost.parameters / 1e6:.2f} M", gflops, f"{1000 * cost.seconds:.1f}"]


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
