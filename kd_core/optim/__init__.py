"""Optimizers whose gradient arrives in streams, each with its own momentum."""

from kd_core.optim.base import StreamOptimizer
from kd_core.optim.presets import deepkd_sgd, deepkd_sgd_released, dot_sgd
from kd_core.optim.stream_adamw import StreamAdamW
from kd_core.optim.stream_sgd import StreamSGD

__all__ = ["StreamAdamW", "StreamOptimizer", "StreamSGD", "deepkd_sgd", "deepkd_sgd_released", "dot_sgd"]
