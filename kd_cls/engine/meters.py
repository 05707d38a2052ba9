"""Sums of a training step's numbers on the device: nothing waits for the GPU until they are read."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.utils.errors import DivergedError


class StepMeters:
    """Means of the terms and of top-1 since the last `read`, and the first iteration with a term that is no number.

    Args:
        names: the terms, in the order that `update` gets them.
        device: of the sums.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        self.first_bad = torch.full((len(names),), math.inf, dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        """Forget the sums, and start the clock."""
        self.sums.zero_()
        self.images = 0
        self.started = time.perf_counter()

    @torch.no_grad()
    def update(self, terms: dict[str, Tensor], output: Tensor, target: Tensor, iteration: int | Tensor) -> None:
        """Add the terms of one (micro-)batch, each a mean over its rows, and its share of right answers."""
        values = torch.stack([terms[name].detach().double() for name in self.names])
        # In place, as the sums are: a CUDA graph goes on with the same memory.
        self.first_bad.copy_(torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp(max=iteration)))
        right = (output.detach().argmax(1) == target).sum()
        self.sums += torch.cat([values * len(target), right.double()[None]])
        self.images += len(target)

    def check(self, learning_rate: float) -> None:
        """Stop at a loss that is no number, on every process.

        Raises:
            DivergedError: names the first iteration, the terms that were not finite at it and the learning rate.
        """
        first_bad = self.first_bad
        if dist.is_initialized():
            first_bad = first_bad.clone()
            dist.all_reduce(first_bad, op=dist.ReduceOp.MIN)
        first = float(first_bad.min())
        if math.isfinite(first):
            bad = [name for name, when in zip(self.names, first_bad.tolist(), strict=True) if when == first]
            raise DivergedError(
                f"the loss is not finite at iteration {int(first)}: {', '.join(bad)} (learning rate "
                f"{learning_rate:.4g}). The last checkpoint is from before; lower SOLVER.BASE_LR or set "
                "SOLVER.CLIP_GRADIENTS.ENABLED True"
            )

    def read(self, world_size: int) -> dict[str, float]:
        """Mean of each term, their sum `loss`, top-1 in percent, images per second of all processes; restarts."""
        count, elapsed = max(self.images, 1), time.perf_counter() - self.started
        *terms, right = (self.sums / count).tolist()
        means = {"loss": sum(terms)} | dict(zip(self.names, terms, strict=True))
        means |= {"top1": 100 * right, "img/s": self.images * world_size / elapsed}
        self.restart()
        return means
