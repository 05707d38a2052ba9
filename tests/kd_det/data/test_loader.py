"""The training loader: batches are a function of (seed, rank, iteration)."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import Dataset

from kd_core.utils.errors import UserError
from kd_det.compat import repeat_factors
from kd_det.data.loader import GroupedBatches, PositionedDataset, TrainLoader, build_train_loader, seeded


class Draws(Dataset):
    """Samples that show their index and what the three generators give."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index, random.random(), float(np.random.rand()), torch.rand(1).item()


def loader(workers=0, seed=3, start=0):
    batches = GroupedBatches(TrainingSampler(20, seed=1), [i % 2 for i in range(20)], batch_size=4)
    made = TrainLoader(PositionedDataset(Draws(), seed), batches, workers)
    made.start = start
    return made


def test_batches_are_the_same_with_and_without_workers_and_from_any_start():
    whole = list(islice(iter(loader()), 9))
    assert list(islice(iter(loader(workers=2)), 9)) == whole
    assert list(islice(iter(loader(start=5)), 4)) == whole[5:]


def test_another_seed_draws_other_augmentations_of_the_same_images():
    (first,), (other,) = islice(iter(loader()), 1), islice(iter(loader(seed=4)), 1)
    assert [x[0] for x in first] == [x[0] for x in other]
    assert all(a[1:] != b[1:] for a, b in zip(first, other, strict=True))


def test_an_image_seen_twice_is_augmented_twice():
    seen = {}
    for batch in islice(iter(loader()), 12):
        for index, *draws in batch:
            assert draws not in seen.setdefault(index, [])
            seen[index].append(draws)
    assert max(len(draws) for draws in seen.values()) > 1


def test_a_batch_holds_images_of_one_group():
    for batch in islice(iter(loader()), 8):
        assert len({index % 2 for index, *_ in batch}) == 1


def test_grouping_delays_images_but_loses_none():
    seen = [index for batch in islice(iter(loader()), 25) for index, *_ in batch]
    waiting = 3  # at the most, in the other group's bucket
    drawn = list(islice(iter(TrainingSampler(20, seed=1)), 100 + waiting))
    assert all(0 <= drawn.count(i) - seen.count(i) <= 1 for i in range(20))


def test_the_first_batch_draws_nothing_from_the_steps_generator():
    before = torch.get_rng_state()
    next(iter(loader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_leaves_the_generators_where_they_were():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(1, 2):
        drawn = random.random(), np.random.rand(), torch.rand(1).item()
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1]) and torch.equal(torch.get_rng_state(), before[2])
    with seeded(1, 2):
        assert drawn == (random.random(), np.random.rand(), torch.rand(1).item())


def test_rare_classes_repeat_by_the_root_of_their_rarity_and_by_the_rarity_itself_where_the_root_is_off(tiny_cfg):
    loader = tiny_cfg("DATALOADER.REPEAT_THRESHOLD", 0.5).DATALOADER
    dicts = [{"annotations": [{"category_id": 0}]}] * 7 + [{"annotations": [{"category_id": 1}]}]
    assert repeat_factors(loader, dicts).tolist() == [1.0] * 7 + [2.0]
    if "REPEAT_SQRT" in loader:  # main
        loader.REPEAT_SQRT = False
        assert repeat_factors(loader, dicts).tolist() == [1.0] * 7 + [4.0]


def test_a_batch_size_that_the_processes_cannot_share_is_refused(tiny_cfg):
    with pytest.raises(UserError, match=r"SOLVER.IMS_PER_BATCH 0 must be a positive multiple of the 1 processes"):
        build_train_loader(tiny_cfg("DATASETS.TRAIN", "('digits_train',)", "SOLVER.IMS_PER_BATCH", 0))


@pytest.fixture
def cfg_of(tiny_cfg, tmp_path):
    """`cfg_of(annotation, …)`: a config whose training set is one image with these annotations."""
    name = f"one_{tmp_path.name}"

    def build(*annotations: dict, **model: object):
        box = {"bbox": [1, 1, 9, 9], "bbox_mode": 1, "category_id": 0}
        record = {"file_name": "a.jpg", "height": 20, "width": 20, "annotations": [box | one for one in annotations]}
        DatasetCatalog.register(name, lambda: [record])
        MetadataCatalog.get(name).set(thing_classes=["thing"], keypoint_names=["nose"], keypoint_flip_map=[])
        cfg = tiny_cfg("DATASETS.TRAIN", (name,), "SOLVER.IMS_PER_BATCH", 1)
        cfg.MODEL.update(model)
        return cfg

    yield build
    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)


MASK = {"segmentation": [[1, 1, 9, 1, 9, 9]]}


@pytest.mark.parametrize(
    ("annotations", "model", "message"),
    [
        ([MASK, {}], {"MASK_ON": True}, r"a\.jpg has things without masks, .* or set MODEL\.MASK_ON False"),
        (
            [MASK, {"segmentation": {"size": [20, 20], "counts": "a"}}],
            {"MASK_ON": True},
            r"a\.jpg has a mask that is no polygon \(RLE\), .*: set INPUT\.MASK_FORMAT bitmask",
        ),
        ([{"keypoints": [5, 5, 2]}, {}], {"KEYPOINT_ON": True}, r"things without keypoints, .* set MODEL\.KEYPOINT_ON"),
        ([{"iscrowd": 1}], {}, r"DATASETS\.TRAIN: No valid data found in .*: images count that have a box of no crowd"),
    ],
)
def test_data_that_a_head_cannot_learn_from_are_refused(cfg_of, annotations, model, message):
    with pytest.raises(UserError, match=message):
        build_train_loader(cfg_of(*annotations, **model))


@pytest.mark.parametrize("mask", [{}, {"segmentation": {"size": [20, 20], "counts": "a"}}], ids=["none", "RLE"])
def test_a_crowd_needs_no_polygon(cfg_of, mask):
    assert len(build_train_loader(cfg_of(MASK, {"iscrowd": 1} | mask, MASK_ON=True)).dataset) == 1


def test_a_detector_of_boxes_needs_no_mask(cfg_of):
    assert len(build_train_loader(cfg_of({})).dataset) == 1
