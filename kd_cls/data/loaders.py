"""timm's loaders, in an order that is a function of (seed, epoch) and can be resumed at any batch."""

from typing import Any, NamedTuple

import torch
from timm.data import create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader, Dataset, Sampler

from kd_cls.data.reproducible import ReproducibleDataset
from kd_cls.data.resident import ResidentLoader
from kd_cls.data.sampler import EpochSampler
from kd_cls.data.transforms import build_transforms
from kd_cls.data.views import TwoViews
from kd_core.utils.errors import UserError
from kd_core.utils.rng import mix_seed

Loader = PrefetchLoader | ResidentLoader


class Loaders(NamedTuple):
    """Both yield (images (N, 3, H, W) normalised, target (N,) int64), on the device."""

    train: Loader
    val: Loader


def create_loaders(
    train_set: Dataset,
    val_set: Dataset,
    *,
    augmentation: str,
    input_size: tuple[int, int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
    val_batch_size: int = 0,
    seed: int = 0,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    reproducible: bool = True,
    augmentation_epochs: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    resident: bool = False,
    timm_options: dict[str, Any] | None = None,
    views: int = 1,
) -> Loaders:
    """The loaders of both splits.

    Args:
        augmentation, input_size, timm_options: see `build_transforms`.
        mean, std: of the student, for pixel values in [0, 1]; a teacher with other statistics renormalises.
        batch_size: training images per rank and step; `val_batch_size` 0 means the same.
        seed: of the order and, with `reproducible`, of the augmentation.
        reproducible: draw augmentations from (seed, epoch, index), see `ReproducibleDataset`.
        augmentation_epochs: after how many epochs the augmentations repeat; 0: never.
        drop_last: drop an incomplete last training batch, which the papers' code keeps.
        resident: keep all images on the device and augment them there, see `ResidentLoader`.
        views: of each training image; two are one image of six channels, see `TwoViews`.

    Raises:
        UserError: an unknown augmentation, a batch size < 1, an empty split, or no full batch under `drop_last`.
    """
    _check_sizes(train_set, val_set, batch_size, val_batch_size)
    transforms = build_transforms(augmentation, input_size, **(timm_options or {}))
    order = EpochSampler(
        len(train_set), batch_size, seed=seed, rank=rank, world_size=world_size, shuffle=shuffle, drop_last=drop_last
    )
    val_order = range(rank, len(val_set), world_size)  # each image once: ranks may differ in length by one
    val_batch_size = val_batch_size or batch_size
    common = {"input_size": input_size, "mean": mean, "std": std, "device": torch.device(device)}
    if resident:
        augment = {"augmentation": augmentation, "augmentation_epochs": augmentation_epochs, "seed": seed}
        return Loaders(
            ResidentLoader(train_set, order, batch_size, **augment, **common),
            ResidentLoader(val_set, val_order, val_batch_size, augmentation="none", **common),
        )
    if reproducible:
        train_set = ReproducibleDataset(train_set, seed, augmentation_epochs)
    common |= {"num_workers": num_workers, "pin_memory": common["device"].type == "cuda"}
    stacked = {"input_size": (3 * views, *input_size[1:]), "mean": views * tuple(mean), "std": views * tuple(std)}
    train = create_loader(train_set, batch_size=batch_size, is_training=True, **common | stacked)
    val = create_loader(val_set, batch_size=val_batch_size, **common)
    train_set.transform, val_set.transform = transforms  # replaces timm's, which have no padded crop
    if views == 2:
        train_set.transform = TwoViews(transforms[0])
    return Loaders(
        _with_sampler(train, order, mix_seed(seed, rank)), _with_sampler(val, val_order, mix_seed(seed, rank))
    )


def _check_sizes(train_set: Dataset, val_set: Dataset, batch_size: int, val_batch_size: int) -> None:
    for split, images in (("training", train_set), ("validation", val_set)):
        if len(images) == 0:
            raise UserError(f"the {split} split has no images")
    if batch_size < 1 or val_batch_size < 0:
        raise UserError(f"batch_size is {batch_size} and val_batch_size {val_batch_size}, expected at least 1 and 0")


def _with_sampler(loader: PrefetchLoader, sampler: Sampler | range, seed: int) -> PrefetchLoader:
    """timm's loader with `sampler`: `create_loader` has no argument for it, so the inner `DataLoader` is rebuilt.

    timm's own samplers take their order from the global generator (one process) or from seed 0 (several), and count
    images twice that pad the validation set to a multiple of the ranks. The loader gets its own generator, so that
    starting an epoch does not advance the global one, and a resumed run draws the same numbers.
    """
    inner = loader.loader
    loader.loader = DataLoader(
        inner.dataset,
        batch_size=inner.batch_size,
        sampler=sampler,
        num_workers=inner.num_workers,
        collate_fn=inner.collate_fn,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        persistent_workers=inner.persistent_workers,
        generator=torch.Generator().manual_seed(seed),
    )
    return loader


def set_epoch(loader: Loader, epoch: int, start_batch: int = 0) -> None:
    """Let the next iteration over a training loader be that of `epoch`, from batch `start_batch` on."""
    loader.sampler.set_epoch(epoch, start_batch)
    for part in (loader, loader.dataset):
        if isinstance(part, (ResidentLoader, ReproducibleDataset)):
            part.set_epoch(epoch)
