"""Accuracy of a classifier over all processes."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from timm.task.evaluator import ClassificationEvaluator
from torch import Tensor

from kd_cls.distributed import Process


@torch.no_grad()
def evaluate(
    predict: Callable[[Tensor], Tensor], loader: Any, process: Process, dtype: torch.dtype | None = None
) -> dict[str, float]:
    """Top-1, top-5 (percent), cross-entropy `loss` and number of `images` over all processes.

    Args:
        predict: images (N, 3, H, W) → logits (N, C); its networks are in eval mode.
        loader: this process's part of the images; the parts may differ in length.
        dtype: of autocast; None leaves it off.
    """
    evaluator = ClassificationEvaluator(process.device)
    for images, target in loader:
        with torch.autocast(process.device.type, dtype, enabled=dtype is not None):
            logits = predict(images)
        evaluator.update(logits, target)
    metrics = dict(evaluator.compute(distributed=dist.is_initialized()))
    count = evaluator.counts[0].clone()
    if dist.is_initialized():
        dist.all_reduce(count)
    return metrics | {"images": int(count)}
