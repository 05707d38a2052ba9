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
    predict: Callable[[Tensor], Tensor],
    loader: Any,
    process: Process,
    dtype: torch.dtype | None = None,
    confusions: Tensor | None = None,
) -> dict[str, float]:
    """Top-1, top-5 (percent), cross-entropy `loss` and number of `images` over all processes.

    Args:
        predict: images (N, 3, H, W) → logits (N, C); its networks are in eval mode.
        loader: this process's part of the images; the parts may differ in length.
        dtype: of autocast; None leaves it off.
        confusions: (C, C), to which the images of each class (row) are added by what they are taken for (column).
    """
    evaluator = ClassificationEvaluator(process.device)
    for images, target in loader:
        with torch.autocast(process.device.type, dtype, enabled=dtype is not None):
            logits = predict(images)
        evaluator.update(logits, target)
        if confusions is not None:
            places = (target * confusions.shape[1] + logits.argmax(1)).to(confusions.device)
            confusions.view(-1).index_add_(0, places, torch.ones_like(places))  # bincount would wait for the device
    metrics = dict(evaluator.compute(distributed=dist.is_initialized()))
    count = evaluator.counts[0].clone()
    if dist.is_initialized():
        dist.all_reduce(count)
        if confusions is not None:
            dist.all_reduce(confusions)
    return metrics | {"images": int(count)}
