"""The training loop, its optimizer, meters, writers and evaluation."""

from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.trainer import Trainer

__all__ = ["Trainer", "evaluate"]
