"""Data sets, augmentation and loaders; timm's where it has them.

    data = create_datasets("digits")  # or "cifar100", "imagenet", "tiny_imagenet", "cub200", "folder", timm's names
    train_set, val_set, num_classes = data
    loaders = create_loaders(train_set, val_set, augmentation="digits", input_size=(3, 32, 32), mean=mean, std=std,
                             batch_size=64, seed=1, reproducible=True)
    for epoch in range(epochs):
        set_epoch(loaders.train, epoch, start_batch=0)     # start_batch > 0 resumes in the middle of an epoch
        for images, target in loaders.train:               # (N, 3, H, W) normalised, (N,) int64, both on the device
            ...

*Data sets* are map-style: `dataset[i]` is (image, class index), the image an RGB `PIL.Image` unless `dataset.transform`
is set; `dataset.classes` names the classes, the same list in both splits. `register_dataset` adds a name.

*Augmentation* is one of `AUGMENTATIONS`: "digits", "cifar", "imagenet", "tiny_imagenet_64", "none";
`default_augmentation(name)` is a data set's own. Options of timm's `create_transform` refine "imagenet".

*Order* comes from `EpochSampler`: a pure function of (seed, epoch), split between ranks without overlap. It can start
at any batch. `loaders.train.sampler.batch_indices(epoch, batch)` are the images of one batch. Validation visits each
image exactly once over all ranks. The ranks' batch counts may differ by one, so no collective call may run in it.

*Randomness*: with `reproducible=True` an augmented image is a pure function of (seed, epoch, index), for any number of
workers and ranks. `augmentation_epochs=n` repeats the augmentation after n epochs, so that a teacher cache is finite.
`resident=True` keeps small images on the device and crops and flips whole batches there, also reproducibly.
"""

from kd_cls.data.datasets import (
    DATASETS,
    DataSets,
    create_datasets,
    dataset_statistics,
    default_augmentation,
    register_dataset,
)
from kd_cls.data.loaders import Loaders, create_loaders, set_epoch
from kd_cls.data.reproducible import ReproducibleDataset
from kd_cls.data.resident import ResidentLoader
from kd_cls.data.sampler import EpochSampler
from kd_cls.data.transforms import AUGMENTATIONS, TIMM_OPTIONS, build_transforms
from kd_cls.data.wrapped import AllButEveryNth, EveryNth

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "TIMM_OPTIONS",
    "AllButEveryNth",
    "DataSets",
    "EpochSampler",
    "EveryNth",
    "Loaders",
    "ReproducibleDataset",
    "ResidentLoader",
    "build_transforms",
    "create_datasets",
    "create_loaders",
    "dataset_statistics",
    "default_augmentation",
    "register_dataset",
    "set_epoch",
]
