"""The data sets and loaders of a config."""

import torch.distributed as dist
from fvcore.common.config import CfgNode
from torch.utils.data import Dataset

from kd_cls.checks import mixes
from kd_cls.config import parse_mapping
from kd_cls.data import (
    AllButEveryNth,
    DataSets,
    EveryNth,
    Loaders,
    create_datasets,
    create_loaders,
    default_augmentation,
)
from kd_cls.data.bad_images import SkipsUnreadable
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process, broadcast_object
from kd_core.utils.errors import UserError


def build_data(cfg: CfgNode) -> DataSets:
    """The training and validation images of DATA.

    Raises:
        UserError: an unknown data set, missing files, an empty class, a single one, or too few images for HELD_OUT,
            TRAIN_IMAGES or VAL_IMAGES.
    """
    if cfg.DATA.DOWNLOAD:
        download(cfg)
    data = create_datasets(cfg.DATA.NAME, cfg.DATA.ROOT)
    if data.num_classes < 2:
        raise UserError(f"DATA.ROOT {cfg.DATA.ROOT}: {data.train.classes[0]} is the only class: nothing to tell apart")
    if cfg.DATA.HELD_OUT:
        data = hold_out(data, cfg)
    if cfg.DATA.BAD_IMAGES == "skip":  # after holding out: the next image takes the place of a bad one
        data = data._replace(train=SkipsUnreadable(data.train))
    return data._replace(
        train=take(data.train, cfg.DATA.TRAIN_IMAGES, "DATA.TRAIN_IMAGES"),
        val=take(data.val, cfg.DATA.VAL_IMAGES, "DATA.VAL_IMAGES"),
    )


def download(cfg: CfgNode) -> None:
    """Download the data, process after process: two at once would write one file.

    Every process has its turn, since machines may share a disk or not; whoever finds the files there is done.

    Raises:
        UserError: on every process, what a download failed of.
    """
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    for turn in range(world_size):
        error = None
        if turn == rank:
            try:
                create_datasets(cfg.DATA.NAME, cfg.DATA.ROOT, download=True)
            except UserError as failed:
                error = str(failed)
        if error := broadcast_object(error, turn):
            raise UserError(error)


def hold_out(data: DataSets, cfg: CfgNode) -> DataSets:
    """DATA.HELD_OUT training images become the validation images, which are not used."""
    count = cfg.DATA.HELD_OUT
    if not 0 < count < len(data.train):
        raise UserError(f"DATA.HELD_OUT is {count}, expected 0 (none) … {len(data.train) - 1} of the training images")
    again = create_datasets(cfg.DATA.NAME, cfg.DATA.ROOT)  # a data set has one transform, and the two differ in it
    return data._replace(train=AllButEveryNth(data.train, count), val=EveryNth(again.train, count))


def take(dataset: Dataset, count: int, key: str) -> Dataset:
    """`count` evenly spaced images of a data set; 0: all."""
    if not 0 <= count <= len(dataset):
        raise UserError(f"{key} is {count}, expected 0 (all) … {len(dataset)}, the size of the split")
    return EveryNth(dataset, count) if count else dataset


def augmentation(cfg: CfgNode) -> str:
    """DATA.AUGMENTATION, or the data set's own where it is empty."""
    return cfg.DATA.AUGMENTATION or default_augmentation(cfg.DATA.NAME)


def build_loaders(cfg: CfgNode, data: DataSets, stats: InputStats, process: Process) -> Loaders:
    """The loaders of both splits: images on the device, normalised for the student; a batch is this process's share."""
    return create_loaders(
        data.train,
        data.val,
        augmentation=augmentation(cfg),
        input_size=(3, stats.size, stats.size),
        mean=stats.mean,
        std=stats.std,
        batch_size=cfg.SOLVER.IMS_PER_BATCH // process.world_size,
        val_batch_size=cfg.DATA.VAL_BATCH,
        seed=cfg.SEED,
        num_workers=cfg.DATA.NUM_WORKERS,
        rank=process.rank,
        world_size=process.world_size,
        device=process.device,
        reproducible=cfg.DATA.REPRODUCIBLE,
        resident=cfg.DATA.RESIDENT,
        augmentation_epochs=cfg.DATA.AUGMENTATION_EPOCHS,
        shuffle=cfg.DATA.SHUFFLE,
        drop_last=mixes(cfg),
        views=cfg.DATA.VIEWS,
        timm_options=parse_mapping(cfg.DATA.TIMM_OPTIONS, "DATA.TIMM_OPTIONS"),
    )
