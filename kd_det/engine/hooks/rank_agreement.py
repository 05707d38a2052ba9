"""Whether all processes still train the same network."""

import hashlib
import logging

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

logger = logging.getLogger(__name__)


class CheckRanksAgree(HookBase):
    """At every checkpoint and at the end, sees that the parameters are equal in every process, to the bit.

    A rank whose weights have drifted (a gradient that was not reduced, a memory error) trains a network of its own
    whose gradients spoil the others', and nothing else would show it. Every rank logs its digest.

    Args:
        period: iterations between checkpoints. It costs a copy of the parameters to the host.
    """

    def __init__(self, period: int) -> None:
        self.period = period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if comm.get_world_size() > 1 and (done % self.period == 0 or done == self.trainer.max_iter):
            check_ranks_agree(self.trainer.checkpointer.model, done)


def check_ranks_agree(model: nn.Module, iterations: int) -> None:
    """Raises RuntimeError, in every process, where the parameters of `model` differ between processes."""
    digest = parameter_digest(model)
    logger.info("Parameters after %d iterations on rank %d: %s", iterations, comm.get_rank(), digest)
    digests = comm.all_gather(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise RuntimeError(
            f"After {iterations} iterations, the parameters of rank{'s' * (len(odd) > 1)} {', '.join(map(str, odd))} "
            "differ from those of rank 0: resume from the last checkpoint, and look for what is done to the model "
            "or its gradients outside of the trainer"
        )


def parameter_digest(model: nn.Module) -> str:
    """SHA-256 of the bytes of all parameters, in their order."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
