"""Small images kept on the device and augmented per batch: loader workers cannot feed a small network fast enough."""

from collections.abc import Iterator

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

from kd_cls.data.sampler import EpochSampler
from kd_cls.data.transforms import fit_size
from kd_core.utils.errors import UserError
from kd_core.utils.rng import mix_seed

PADDING = {"cifar": 4, "digits": 4, "none": 0}  # pixels on each side, from which a crop of the input size is drawn
FLIPPED = ("cifar",)


class ResidentLoader:
    """Yields (images (N, 3, H, W) normalised, target (N,)) as timm's `PrefetchLoader` does, from one uint8 tensor.

    The augmentation has the distribution of `transforms.cifar` or `transforms.digits`, with other draws. An epoch is
    drawn for all images at once, so an augmented image is a pure function of (seed, epoch, index).

    Args:
        dataset: map-style, yields (RGB image, class index); it is read completely here.
        sampler: the order: an `EpochSampler` for training, a range for validation.
        batch_size: images per batch.
        augmentation: a key of `PADDING`; "none" for validation.
        input_size: (3, H, W).
        mean, std: of the student, for pixel values in [0, 1].
        seed: of the augmentation.
        augmentation_epochs: after how many epochs the augmentations repeat; 0: never.
        device: of the images.

    Raises:
        UserError: an augmentation that only works on single images.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: EpochSampler | range,
        batch_size: int,
        *,
        augmentation: str,
        input_size: tuple[int, int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        augmentation_epochs: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if augmentation not in PADDING:
            raise UserError(
                f"augmentation {augmentation!r} works on single images and cannot run on the device (DATA.RESIDENT): "
                f"set DATA.RESIDENT False, or choose one of {', '.join(sorted(PADDING))}"
            )
        self.dataset, self.sampler, self.batch_size = dataset, sampler, batch_size
        self.augmentation, self.size = augmentation, tuple(input_size[-2:])
        self.seed, self.augmentation_epochs, self.epoch = seed, augmentation_epochs, 0
        images, targets = _read(dataset, self.size)
        self.images = F.pad(images, [PADDING[augmentation]] * 4).to(device)  # (n, 3, H + 2 pad, W + 2 pad)
        self.targets = targets.to(device)
        self.mean, self.std = (255 * torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, std))

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation from `epoch` in the next iteration."""
        self.epoch = epoch % self.augmentation_epochs if self.augmentation_epochs else epoch

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        draws = self._draw()
        order = torch.tensor(list(self.sampler), dtype=torch.int64).to(self.images.device)
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            images = self._crop(batch, *(draw[batch] for draw in draws)).float()
            yield images.sub_(self.mean).div_(self.std), self.targets[batch]

    def _draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Top, left and flip, each (n,), of every image's crop in this epoch."""
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        count, places = len(self.images), 2 * PADDING[self.augmentation] + 1
        top, left = torch.randint(places, (2, count), generator=generator)
        flip = torch.rand(count, generator=generator) < (0.5 if self.augmentation in FLIPPED else 0.0)
        device = self.images.device
        return top.to(device), left.to(device), flip.to(device)

    def _crop(self, batch: torch.Tensor, top: torch.Tensor, left: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) uint8: the window of each image at (top, left), mirrored where `flip` is True."""
        height, width = (torch.arange(length, device=batch.device) for length in self.size)
        rows = top[:, None] + height  # (N, H)
        columns = left[:, None] + torch.where(flip[:, None], width.flip(0), width)  # (N, W)
        channels = torch.arange(3, device=batch.device)
        return self.images[
            batch[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None, :]
        ]


def _read(dataset: Dataset, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """All images (n, 3, H, W) as uint8, resized to `size`, and their classes (n,)."""
    dataset.transform = fit_size(size)
    images, targets = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(targets)
