"""The order of the training images: a pure function of (seed, epoch), split between ranks, starting at any batch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from kd_core.utils.errors import UserError
from kd_core.utils.rng import mix_seed


class EpochSampler(Sampler[int]):
    """Indices 0 … size−1 in an order drawn from (seed, epoch). Rank r of W takes every W-th of them, from the r-th on.

    Batch b of all ranks together is therefore batch b of one process with W times the batch size: W ranks see the same
    images in the same steps as one. torch's `RandomSampler` takes its order from the global generator, and neither it
    nor `DistributedSampler` can start in the middle of an epoch.

    Args:
        size: images in the data set.
        batch_size: images per rank and step.
        seed: of the order.
        rank, world_size: this process among all.
        shuffle: False keeps the data set's order.
        drop_last: leave out an incomplete last batch. Otherwise it is kept; where the number of images is not a
            multiple of the ranks, the first images of the order are repeated to fill it.

    Raises:
        UserError: with `drop_last`, if there is not one full batch.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.shuffle, self.drop_last = shuffle, drop_last
        self.epoch, self.start_batch = 0, 0
        self._last: tuple[int, torch.Tensor] | None = None  # the latest epoch and its order
        if drop_last and size < batch_size * world_size:
            raise UserError(
                f"{size} training images do not fill one batch of {batch_size} on {world_size} rank(s), and the last, "
                "smaller batch is dropped: use a smaller batch"
            )

    @property
    def num_samples(self) -> int:
        """Images per rank in a whole epoch."""
        if self.drop_last:
            return self.size // (self.batch_size * self.world_size) * self.batch_size
        return -(-self.size // self.world_size)

    @property
    def num_batches(self) -> int:
        """Batches in a whole epoch, wherever iteration starts."""
        return -(-self.num_samples // self.batch_size)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Iterate over `epoch` next, from its batch `start_batch` on."""
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(f"start_batch {start_batch} is not in the epoch's 0 … {self.num_batches} batches")
        self.epoch, self.start_batch = epoch, start_batch

    def order(self, epoch: int) -> torch.Tensor:
        """The indices (num_samples,) that this rank visits in `epoch`."""
        if self._last is None or self._last[0] != epoch:
            self._last = epoch, self._draw_order(epoch)
        return self._last[1]

    def _draw_order(self, epoch: int) -> torch.Tensor:
        if self.shuffle:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        total = self.num_samples * self.world_size
        order = order.repeat(-(-total // self.size))[:total]
        return order[self.rank :: self.world_size]

    def batch_indices(self, epoch: int, batch: int) -> torch.Tensor:
        """The images of this rank's batch number `batch` of `epoch`."""
        return self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch)[self.start_batch * self.batch_size :].tolist())

    def __len__(self) -> int:
        return self.num_samples - min(self.start_batch * self.batch_size, self.num_samples)
