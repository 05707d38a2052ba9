"""Sums of a training step's numbers on the device: nothing waits for the GPU until they are read."""

import math
import time

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.utils.errors import DivergedError


class StepMeters:
    """Means of the terms and of top-1 since the last `read`, and the first iteration with a term that is not finite.

    Args:
        names: of the terms.
        device: of the sums.
    """

    def __init__(self, names: list[str], device: torch.device) -> None:
        self.names = names
        self.sums = torch.zeros(len(names) + 1, dtype=torch.float64, device=device)
        self.images = torch.zeros((), dtype=torch.float64, device=device)
        self.first_bad = torch.full((len(names),), math.inf, dtype=torch.float64, device=device)
        self.restart()

    def restart(self) -> None:
        """Forget the sums, and start the clock."""
        self.sums.zero_()
        self.images.zero_()
        self.started = time.perf_counter()

    @torch.no_grad()
    def update(self, terms: dict[str, Tensor], output: Tensor, target: Tensor, iteration: int | Tensor) -> None:
        """Add the terms of one (micro-)batch, each a mean over its rows, and the number of its correct predictions."""
        values = torch.stack([terms[name].detach().double() for name in self.names])
        # In place, as all sums are: a replayed CUDA graph writes to the same memory.
        self.first_bad.copy_(torch.where(values.isfinite(), self.first_bad, self.first_bad.clamp(max=iteration)))
        correct = (output.detach().argmax(1) == target).sum()
        self.sums += torch.cat([values * len(target), correct.double()[None]])
        self.images += len(target)

    def check(self, learning_rate: float) -> None:
        """Stop every process at a loss that is not finite.

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
        """Mean of each term, their sum `loss`, top-1 in percent, images per second of all processes. Restarts."""
        elapsed, images = time.perf_counter() - self.started, int(self.images)
        *terms, correct = (self.sums / max(images, 1)).tolist()
        means = {"loss": sum(terms)} | dict(zip(self.names, terms, strict=True))
        means |= {"top1": 100 * correct, "img/s": images * world_size / elapsed}
        self.restart()
        return means
