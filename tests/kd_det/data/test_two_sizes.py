"""Teacher and student see different sizes of the same view."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import Boxes
from fvcore.transforms.transform import CropTransform, HFlipTransform
from PIL import Image
from torch.testing import assert_close

from kd_core.utils.errors import UserError
from kd_det.data.loader import build_train_loader, seeded
from kd_det.data.two_sizes import TwoSizeMapper, build_train_mapper, scaled_transforms
from kd_det.modeling.teacher.view import rescale_proposals, scale_boxes

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
TWO = (*DKD, "KD.TEACHER.IMAGE_SCALE", 2.0, "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.CROP.ENABLED", True)


@pytest.fixture
def picture(tmp_path):
    """A data set's entry: a smooth image of 96 × 120 px with one box."""
    y, x = np.mgrid[0:96, 0:120]
    pixels = np.stack([2 * x, 2 * y, x + y], axis=2).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    box = {"bbox": [30.0, 20.0, 90.0, 70.0], "bbox_mode": 0, "category_id": 1}
    return {"file_name": str(tmp_path / "picture.png"), "height": 96, "width": 120, "annotations": [box]}


def test_the_students_half_of_the_view_is_that_of_a_plain_training_to_the_bit(tiny_cfg, picture):
    cfg = tiny_cfg(*TWO)
    for draw in range(4):
        with seeded(0, draw):
            plain = DatasetMapper(cfg, True)(picture)
            after = torch.rand(1)
        with seeded(0, draw):
            ours = TwoSizeMapper(cfg, True)(picture)
            assert torch.equal(torch.rand(1), after)
        assert torch.equal(ours["image"], plain["image"])
        assert torch.equal(ours["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
        assert set(ours) - set(plain) == {"teacher_image"}


def test_the_teachers_image_is_the_same_crop_and_flip_in_its_own_size(tiny_cfg, picture):
    mapper = TwoSizeMapper(tiny_cfg(*TWO), True)
    flips = set()
    for draw in range(6):
        with seeded(1, draw):
            mapped = mapper(picture)
        height, width = mapped["image"].shape[1:]
        assert mapped["teacher_image"].shape == (3, 2 * height, 2 * width)
        larger = mapped["teacher_image"].float()
        shrunk = torch.nn.functional.avg_pool2d(larger, 2)
        assert (shrunk - mapped["image"].float()).abs().max() < 6  # of 255, on slopes of 2 a pixel
        flips.add(bool(larger[0, 0, 0] > larger[0, 0, -1]))  # the third channel of BGR rises with x
    assert flips == {False, True}
    assert mapper.augmentations.image is None


def test_detail_that_the_student_has_lost_is_in_the_teachers_image(tiny_cfg, tmp_path, picture):
    stripes = np.zeros((96, 120, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(picture["file_name"])
    cfg = tiny_cfg(*DKD, "KD.TEACHER.IMAGE_SCALE", 2.0, "INPUT.MIN_SIZE_TRAIN", "(48,)")
    mapped = TwoSizeMapper(cfg, True)(picture)
    assert mapped["teacher_image"].float().std() > 100 > 10 > mapped["image"].float()[:, :, 2:-2].std()


def test_a_plain_mapper_serves_where_sizes_are_equal_or_nothing_is_distilled(tiny_cfg):
    assert type(build_train_mapper(tiny_cfg(*DKD))) is DatasetMapper
    assert type(build_train_mapper(tiny_cfg(*TWO, "KD.LOSS.NAME", "none"))) is DatasetMapper
    assert type(build_train_mapper(tiny_cfg(*TWO))) is TwoSizeMapper


@pytest.mark.parametrize("workers", [0, 1])
def test_the_training_loader_brings_both_sizes_to_the_model(tiny_cfg, tiny_model, storage, workers):
    data = ("DATASETS.TRAIN", "('digits_train',)", "SOLVER.IMS_PER_BATCH", 2, "SEED", 1)
    cfg = tiny_cfg(*TWO, *data, "DATALOADER.NUM_WORKERS", workers)
    batch = next(iter(build_train_loader(cfg)))
    for item in batch:
        assert [2 * side for side in item["image"].shape[1:]] == list(item["teacher_image"].shape[1:])
        assert item["teacher_image"].dtype == torch.uint8
    losses = tiny_model(*TWO)(batch)
    assert losses["loss_kd_nckd"].isfinite() and losses["loss_kd_nckd"] > 0


@pytest.mark.parametrize(
    ("transforms", "what"),
    [
        ([HFlipTransform(8)], "no resize"),
        ([T.ResizeTransform(8, 8, 4, 4), CropTransform(0, 0, 2, 2)], "CropTransform"),
        ([T.ResizeTransform(8, 8, 4, 4), T.ResizeTransform(4, 4, 2, 2)], "a second resize"),
        ([T.RotationTransform(8, 8, 10), T.ResizeTransform(8, 8, 4, 4)], "RotationTransform"),
    ],
)
def test_augmentations_that_cannot_be_repeated_in_another_size_are_refused(transforms, what):
    with pytest.raises(UserError, match=rf"KD.TEACHER.IMAGE_SCALE: the augmentations have {what}; .* 'teacher_image'"):
        scaled_transforms(T.TransformList(transforms), 2.0)


def test_a_size_of_0_is_refused(tiny_cfg):
    with pytest.raises(UserError, match=r"KD.TEACHER.IMAGE_SCALE is 0.0: a size must be above 0"):
        build_train_mapper(tiny_cfg(*TWO, "KD.TEACHER.IMAGE_SCALE", 0.0))


def test_boxes_keep_their_place_in_another_size():
    boxes = Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert scale_boxes(boxes, (10, 20), (10, 20)) is boxes
    assert scale_boxes(boxes, (10, 20), (30, 40)).tensor.tolist() == [[2, 6, 6, 12]]
    assert boxes.tensor.tolist() == [[1, 2, 3, 4]]
    from detectron2.structures import Instances

    found = Instances((30, 40), proposal_boxes=Boxes(torch.tensor([[2.0, 6, 50, 12]])), objectness_logits=torch.ones(1))
    carried = rescale_proposals(found, (30, 40), (10, 20))
    assert carried.proposal_boxes.tensor.tolist() == [[1, 2, 20, 4]] and carried.image_size == (10, 20)


def test_the_teachers_logits_are_those_on_its_own_image_at_the_scaled_boxes(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    for item in batch:
        item["teacher_image"] = item["image"].repeat_interleave(2, 1).repeat_interleave(2, 2)
    boxes = [Boxes(torch.tensor([[4.0, 6, 40, 50]])), Boxes(torch.tensor([[0.0, 0, 64, 64], [8, 8, 30, 30]]))]
    (ours,) = model.teacher.view(batch, "BGR").box_logits([boxes])
    larger = [{"image": item["teacher_image"]} for item in batch]
    (expected,) = model.teacher.view(larger, "BGR").box_logits([[Boxes(b.tensor * 2) for b in boxes]])
    assert torch.equal(ours, expected)
    (other,) = model.teacher.view([{"image": item["image"]} for item in batch], "BGR").box_logits([boxes])
    assert not torch.equal(ours, other)
    assert {"loss_kd_tckd", "loss_kd_nckd"} <= set(model(batch))


def test_proposals_come_back_in_the_students_pixels(tiny_model, batch):
    model = tiny_model(*DKD)
    larger = [{"image": item["image"].repeat_interleave(2, 1).repeat_interleave(2, 2)} for item in batch]
    alone = model.teacher.view(larger, "BGR").proposals()
    both = [{**item, "teacher_image": big["image"]} for item, big in zip(batch, larger, strict=True)]
    for ours, theirs in zip(model.teacher.view(both, "BGR").proposals(), alone, strict=True):
        assert ours.image_size == (64, 64) and theirs.image_size == (128, 128)
        assert_close(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor / 2)


def test_inputs_without_the_asked_size_are_refused(tiny_model, batch, storage):
    with pytest.raises(UserError, match=r"KD.TEACHER.IMAGE_SCALE asks for .* the inputs have no 'teacher_image'"):
        tiny_model(*DKD, "KD.TEACHER.IMAGE_SCALE", 2.0)(batch)
