"""Images that cannot be decoded: named in one line, or, in training, skipped in a way that a resume repeats."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from PIL import Image

from kd_core.utils.errors import UserError
from kd_det.checks import check_before_training
from kd_det.data import register_datasets
from kd_det.data.loader import build_train_loader
from kd_det.engine.trainer import DistillationTrainer


@pytest.fixture
def broken_cfg(tiny_cfg: Callable[..., CfgNode], tmp_path: Path) -> Callable[..., CfgNode]:
    """A config whose training set has four images, the third of which is a JPEG that ends too early."""
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for index in range(4):
        Image.effect_noise((64, 64), 50 + index).convert("RGB").save(folder / f"{index}.jpg")
        images.append({"id": index, "file_name": f"{index}.jpg", "width": 64, "height": 64})
        annotations.append({"id": index, "image_id": index, "category_id": 1, "bbox": [5, 5, 20, 20], "iscrowd": 0})
    whole = (folder / "2.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(whole[: len(whole) // 2])
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "noise"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    name = f"broken_{tmp_path.name}"

    def build(*overrides: object) -> CfgNode:
        cfg = tiny_cfg("SEED", 3, "SOLVER.IMS_PER_BATCH", 2, "DATALOADER.NUM_WORKERS", 0, *overrides)
        cfg.DATASETS.REGISTER = [[name, str(tmp_path / "train.json"), str(folder)]]
        cfg.DATASETS.TRAIN = (name,)
        register_datasets(cfg)
        return cfg

    return build


def batches(cfg: CfgNode, count: int, start: int = 0) -> list[list[dict]]:
    loader = build_train_loader(cfg)
    loader.start = start
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("workers", [0, 1])
def test_by_default_the_training_ends_with_one_line_that_names_the_file(broken_cfg, workers):
    with pytest.raises(UserError, match=r"2\.jpg cannot be used: .*truncated.*DATASETS\.BAD_IMAGES skip") as raised:
        batches(broken_cfg("DATALOADER.NUM_WORKERS", workers), 4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_ends_with_one_line_that_names_the_file(broken_cfg, workers):
    cfg = broken_cfg("DATALOADER.NUM_WORKERS", workers, "DATASETS.BAD_IMAGES", "skip")
    loader = DistillationTrainer.build_test_loader(cfg, cfg.DATASETS.TRAIN[0])
    assert len(loader) == 4
    with pytest.raises(UserError, match=r"2\.jpg cannot be used: .*truncated.*check_data") as raised:
        list(loader)
    assert "\n" not in str(raised.value) and "BAD_IMAGES" not in str(raised.value)


def test_skipped_images_are_replaced_the_same_way_after_a_resume(broken_cfg, caplog):
    cfg = broken_cfg("DATASETS.BAD_IMAGES", "skip")
    undisturbed, resumed = batches(cfg, 6), batches(cfg, 3, start=3)
    seen = [sample["file_name"] for batch in undisturbed for sample in batch]
    assert len(seen) == 12 and not any(name.endswith("2.jpg") for name in seen)
    for one, other in zip(undisturbed[3:], resumed, strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_a_skipped_file_is_logged_once(broken_cfg, caplog):
    batches(broken_cfg("DATASETS.BAD_IMAGES", "skip"), 6)
    assert sum("2.jpg is left out" in record.getMessage() for record in caplog.records) == 1


def test_an_error_with_another_cause_than_the_image_keeps_its_type(broken_cfg):
    cfg = broken_cfg("DATASETS.BAD_IMAGES", "skip")

    def buggy(record: dict) -> dict:
        raise ZeroDivisionError("a bug of the mapper")

    (Path(cfg.DATASETS.REGISTER[0][2]) / "2.jpg").unlink()
    Image.new("RGB", (64, 64)).save(Path(cfg.DATASETS.REGISTER[0][2]) / "2.jpg")
    with pytest.raises(ZeroDivisionError):
        next(iter(build_train_loader(cfg, mapper=buggy)))


def test_data_without_a_readable_image_end_the_training(broken_cfg):
    cfg = broken_cfg("DATASETS.BAD_IMAGES", "skip")
    for path in Path(cfg.DATASETS.REGISTER[0][2]).iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not one of the 4 images can be decoded"):
        batches(cfg, 1)


def test_a_word_that_is_neither_error_nor_skip_is_refused(broken_cfg):
    message = "DATASETS.BAD_IMAGES is 'stop': expected error or skip"
    with pytest.raises(UserError, match=message):
        check_before_training(broken_cfg("DATASETS.BAD_IMAGES", "stop"), resume=False)
