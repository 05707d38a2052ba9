"""Hooks of a training in several processes: shared statistics, and a check that the weights are equal."""

import logging
import statistics

from detectron2.engine import HookBase
from detectron2.utils import comm
from timm.utils import distribute_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_core.utils.state_dict import weights_digest

logger = logging.getLogger(__name__)


class ShareBatchNorm(HookBase):
    """Before a checkpoint and before an evaluation, averages BatchNorm's running statistics over the processes, and the
    moving average of foreground anchors by which a one-stage detector divides its losses.

    Training itself normalises by the batch, and each process divides by its own average. But without this, a checkpoint
    would hold rank 0's statistics only, and a resumed training would differ from an uninterrupted one. Register it in
    every process, before the hooks that save and evaluate.

    Args:
        models: the student, and its moving average.
        periods: iterations between checkpoints and between evaluations; 0 for none. The last iteration always counts.
    """

    def __init__(self, models: list[nn.Module], periods: tuple[int, ...]) -> None:
        self.models, self.periods = models, [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            for model in self.models:
                share_batch_norm(model)


def share_batch_norm(model: nn.Module) -> None:
    """Average running means and variances, and `loss_normalizer`, over the processes.

    FrozenBatchNorm2d is left out: its statistics are constants, equal everywhere, and averaging might round them.
    """
    if comm.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            distribute_bn(module, comm.get_world_size(), reduce=True)
    if hasattr(model, "loss_normalizer"):
        model.loss_normalizer = statistics.fmean(comm.all_gather(float(model.loss_normalizer)))


class CheckRanksAgree(HookBase):
    """At every checkpoint and at the end, checks that the parameters are equal in every process, to the bit.

    A rank whose weights have drifted (a gradient that was not reduced, a memory error) spoils the gradients of the
    others, and nothing else would show it. Every rank logs its digest.

    Args:
        period: iterations between checkpoints. Each check copies the parameters to the host.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if comm.get_world_size() > 1 and (done % self.period == 0 or done == self.trainer.max_iter):
            check_ranks_agree(self.trainer.checkpointer.model, done)


def check_ranks_agree(model: nn.Module, iterations: int) -> None:
    """Raises RuntimeError, in every process, where the parameters of `model` differ between processes."""
    digest = weights_digest(dict(model.named_parameters()))
    logger.info("Parameters after %d iterations on rank %d: %s", iterations, comm.get_rank(), digest)
    digests = comm.all_gather(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise RuntimeError(
            f"After {iterations} iterations, the parameters of rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} "
            "differ from those of rank 0: resume from the last checkpoint, and look for code outside the trainer "
            "that changes the model or its gradients"
        )
