"""The data of a config: data sets cut to the number of images asked for, and their loaders."""

import torch
from fvcore.common.config import CfgNode
from timm.data.loader import PrefetchLoader
from torch.utils.data import Dataset

from kd_cls.checks import mixes
from kd_cls.data import DataSets, EveryNth, Loaders, create_datasets, create_loaders, default_augmentation
from kd_cls.distributed import Process
from kd_cls.models.factory import InputStats, parse_mapping
from kd_core.utils.errors import UserError


def build_data(cfg: CfgNode) -> DataSets:
    """The training and validation images of DATA.

    Raises:
        UserError: an unknown data set, missing files, an empty class, or more images asked for than there are.
    """
    data = create_datasets(cfg.DATA.NAME, cfg.DATA.ROOT, download=cfg.DATA.DOWNLOAD)
    return data._replace(
        train=take(data.train, cfg.DATA.TRAIN_IMAGES, "DATA.TRAIN_IMAGES"),
        val=take(data.val, cfg.DATA.VAL_IMAGES, "DATA.VAL_IMAGES"),
    )


def take(dataset: Dataset, count: int, key: str) -> Dataset:
    """`count` images of a data set; 0: all."""
    if not 0 <= count <= len(dataset):
        raise UserError(f"{key} is {count}, expected 0 (all) … {len(dataset)}, the images there are")
    return EveryNth(dataset, count) if count else dataset


def augmentation(cfg: CfgNode) -> str:
    """The augmentation of DATA; empty: the data set's own."""
    return cfg.DATA.AUGMENTATION or default_augmentation(cfg.DATA.NAME)


def build_loaders(cfg: CfgNode, data: DataSets, stats: InputStats, process: Process) -> Loaders:
    """The loaders of both splits: images normalised for the student, on the device; a batch is one step's share."""
    timm_options = parse_mapping(cfg.DATA.TIMM_OPTIONS, "DATA.TIMM_OPTIONS")
    erasing = sorted(name for name in timm_options if name.startswith("re_"))
    if erasing:  # timm's loader erases on the device, from a generator that no seed of ours reaches
        raise UserError(
            f"DATA.TIMM_OPTIONS has {', '.join(erasing)}, but random erasing is not reproducible here: leave it out"
        )
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
        timm_options=timm_options,
    )


def build_val_loader(cfg: CfgNode, data: DataSets, stats: InputStats, process: Process) -> PrefetchLoader:
    """The loader of the validation images alone."""
    return build_loaders(cfg, data, stats, process).val


def autocast_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The dtype of SOLVER.AMP, None where it is off."""
    return getattr(torch, cfg.SOLVER.AMP.DTYPE) if cfg.SOLVER.AMP.ENABLED else None
