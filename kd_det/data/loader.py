"""The training data loader, which can start at any iteration with the batches an undisturbed run would see there.

detectron2's own loader draws the augmentation from whatever state the random generators are in, and groups images by
aspect ratio as they come out of the workers: a resumed run cannot know either. Here both are functions of the sampler's
position.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MapDataset, get_detection_dataset_dicts
from detectron2.data.build import trivial_batch_collator, worker_init_reset_seed
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from kd_core.utils.errors import UserError
from kd_core.utils.rng import mix_seed_32, preserved_rng, seed_rng
from kd_det.compat import repeat_factors
from kd_det.data.bad_images import BadImage, NamedBadImages
from kd_det.data.two_sizes import build_train_mapper
from kd_det.modeling.meta_arch.registry import BOX_CLASSES, PIXEL_CLASSES, class_keys

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Draw from `random`, numpy and torch as if seeded with `entropy`; afterwards their states are restored."""
    with preserved_rng():
        seed_rng(mix_seed_32(*entropy))
        yield


class PositionedDataset(Dataset):
    """Maps (position, index) to the sample `index`, augmented as a function of (seed, position) alone.

    Args:
        dataset: map-style, with augmentation.
        seed: None leaves the augmentation to the generators' state.
    """

    def __init__(self, dataset: Dataset, seed: int | None) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, int]) -> dict[str, Any]:
        position, index = item
        if self.seed is None:
            return self.dataset[index]
        with seeded(self.seed, position):
            return self.dataset[index]


class GroupedBatches:
    """Batches of (position, index) whose images are all wide or all tall, so that padding wastes little.

    Args:
        sampler: yields this rank's indices without end, the same ones each time it is iterated.
        groups: the group of every index: a batch holds indices of one group. None: any indices in their order.
        batch_size: images of this rank.
        rank, world_size: make positions unique over all ranks.
        start: number of leading batches to skip. Skipping is cheap: only indices are drawn.
    """

    def __init__(
        self,
        sampler: Sampler,
        groups: list[int] | None,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.sampler, self.groups, self.batch_size = sampler, groups, batch_size
        self.rank, self.world_size, self.start = rank, world_size, start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return islice(self._all(), self.start, None)

    def _all(self) -> Iterator[list[tuple[int, int]]]:
        buckets: dict[int, list[tuple[int, int]]] = {}
        for count, index in enumerate(self.sampler):
            bucket = buckets.setdefault(self.groups[index] if self.groups else 0, [])
            bucket.append((count * self.world_size + self.rank, index))
            if len(bucket) == self.batch_size:
                yield list(bucket)
                bucket.clear()


class TrainLoader:
    """An endless iterable of batches (lists of mapped dicts) that begins at batch `start`.

    `start` is read when the first batch is asked for, after a trainer has found out where it resumes.
    """

    def __init__(self, dataset: PositionedDataset, batches: GroupedBatches, num_workers: int) -> None:
        self.dataset, self.batches, self.num_workers = dataset, batches, num_workers
        self.start = 0

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        self.batches.start = self.start
        # Starting the workers draws a random number, which must not advance the training's generator.
        generator = None if self.dataset.seed is None else torch.Generator().manual_seed(self.dataset.seed)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.batches,
            num_workers=self.num_workers,
            generator=generator,
            collate_fn=trivial_batch_collator,
            worker_init_fn=worker_init_reset_seed,
        )
        for batch in loader:
            BadImage.refuse(batch)
            yield batch


def build_train_loader(cfg: CfgNode, mapper: Callable[[dict], dict] | None = None) -> TrainLoader:
    """The training loader of `cfg.DATASETS.TRAIN`, with detectron2's data sets, mapper and samplers.

    With SEED ≥ 0 the batches are a function of (SEED, rank, iteration), whatever the number of workers.
    """
    world_size = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % world_size or cfg.SOLVER.IMS_PER_BATCH <= 0:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a positive multiple of the {world_size} processes"
        )
    try:
        dicts = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    except AssertionError as error:  # of detectron2, where nothing is left
        raise UserError(
            f"DATASETS.TRAIN: {error}: images count that have a box of no crowd (or, with MODEL.KEYPOINT_ON, enough "
            "keypoints), unless DATALOADER.FILTER_EMPTY_ANNOTATIONS is False"
        ) from error
    seed = cfg.SEED if cfg.SEED >= 0 else None
    return make_train_loader(cfg, dicts, mapper or build_train_mapper(cfg), build_sampler(cfg, dicts, seed))


def make_train_loader(
    cfg: CfgNode, dicts: list[dict], mapper: Callable[[dict], dict], sampler: Sampler
) -> TrainLoader:
    """The loader of detectron2's dataset dicts, as SOLVER.IMS_PER_BATCH, DATALOADER and SEED say."""
    seed, world_size = cfg.SEED if cfg.SEED >= 0 else None, comm.get_world_size()
    check_annotated(cfg, dicts)
    groups = [int(d["width"] > d["height"]) for d in dicts] if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
    batches = GroupedBatches(sampler, groups, cfg.SOLVER.IMS_PER_BATCH // world_size, comm.get_rank(), world_size)
    records = DatasetFromList(dicts, copy=False)  # packed: as Python objects they would take four times the memory
    dataset = NamedBadImages(MapDataset(records, mapper), records, cfg.DATASETS.BAD_IMAGES)
    return TrainLoader(PositionedDataset(dataset, seed), batches, cfg.DATALOADER.NUM_WORKERS)


def check_annotated(cfg: CfgNode, dicts: list[dict]) -> None:
    """Refuse records without the label maps, masks or keypoints that the meta-architecture learns from."""
    name, keys = cfg.MODEL.META_ARCHITECTURE, class_keys(cfg.MODEL.META_ARCHITECTURE)
    if PIXEL_CLASSES in keys and (bare := next((d for d in dicts if "sem_seg_file_name" not in d), None)):
        raise UserError(
            f"DATASETS.TRAIN: {bare['file_name']} has no label map, from which {name} learns: name a data set that has "
            "them (DATASETS.REGISTER_SEM_SEG for your own)"
        )
    for key, field, what in (("MASK_ON", "segmentation", "masks"), ("KEYPOINT_ON", "keypoints", "keypoints")):
        if cfg.MODEL[key] and BOX_CLASSES[0] in keys and (bare := next((d for d in dicts if lacks(d, field)), None)):
            raise UserError(
                f"DATASETS.TRAIN: {bare['file_name']} has things without {what}, from which {name} learns: give every "
                f"annotation its {field}, or set MODEL.{key} False"
            )
    if cfg.MODEL.MASK_ON and BOX_CLASSES[0] in keys and cfg.INPUT.MASK_FORMAT == "polygon":
        for record in dicts:
            things = (one for one in record.get("annotations", ()) if not one.get("iscrowd"))
            if any(not isinstance(one.get("segmentation", []), list) for one in things):
                raise UserError(
                    f"DATASETS.TRAIN: {record['file_name']} has a mask that is no polygon (RLE), and INPUT.MASK_FORMAT "
                    "is polygon: set INPUT.MASK_FORMAT bitmask"
                )


def lacks(record: dict[str, Any], field: str) -> bool:
    """Whether an annotation of a record, other than of a crowd, is without `field`."""
    return any(field not in one for one in record.get("annotations", [{}]) if not one.get("iscrowd"))


def build_sampler(cfg: CfgNode, dicts: Iterable[dict], seed: int | None) -> Sampler:
    """The sampler that DATALOADER.SAMPLER_TRAIN names."""
    check_sampler(cfg.DATALOADER.SAMPLER_TRAIN)
    if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
        return TrainingSampler(len(dicts), seed=seed)
    return RepeatFactorTrainingSampler(repeat_factors(cfg.DATALOADER, dicts), seed=seed)


def check_sampler(name: str) -> None:
    """Raise a UserError for a sampler that is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise UserError(f"DATALOADER.SAMPLER_TRAIN is {name!r}: expected {' or '.join(SAMPLERS)}")
