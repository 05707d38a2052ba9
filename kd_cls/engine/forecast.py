"""What a distillation costs, before it starts: parameters, GFLOPs, latency of both networks, and training time."""

import statistics
import time
from itertools import islice, pairwise

import torch
from fvcore.common.config import CfgNode

from kd_cls.build import build_trainer
from kd_cls.checks import mixes
from kd_cls.data.build import build_data
from kd_cls.data.sampler import EpochSampler
from kd_cls.distributed import Process
from kd_cls.models.factory import build_student, input_stats
from kd_cls.task.teacher import build_teacher
from kd_core.utils.latency import Cost, measure_cost, wait_for_device

STEPS = 3  # measured


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
    device, costs = process.device, {}
    for name, model, size in (("teacher", teacher.model, teacher.stats.size), ("student", student, stats.size)):
        costs[name] = measure_cost(model.to(device), torch.rand(1, 3, size, size, device=device))
    return costs


def training_seconds(cfg: CfgNode, process: Process, processes: int) -> float:
    """All iterations at the time of a few, measured with one process's share of a batch; the first one warms up."""
    share = cfg.SOLVER.IMS_PER_BATCH // processes
    real = EpochSampler(len(build_data(cfg).train), share, world_size=processes, drop_last=mixes(cfg))
    trainer = build_trainer(on_trial(cfg, process, processes), process, sampler=real)
    trainer.task.train()
    order = trainer.loaders.train.sampler.order(0).split(trainer.loaders.train.sampler.batch_size)
    times = [time.perf_counter()]
    for (images, target), indices in islice(zip(trainer.loaders.train, order, strict=True), STEPS + 1):
        if len(images) < share and len(times) > 1:
            break  # the last batch is smaller: not what is measured
        trainer.step(images, target, 0, indices)
        wait_for_device(trainer.task)
        times.append(time.perf_counter())
    measured = [end - start for start, end in pairwise(times)]
    # With a share of the batch this one process has as many times the iterations of the training.
    return trainer.max_iter / processes * statistics.median(measured[1:] or measured)
