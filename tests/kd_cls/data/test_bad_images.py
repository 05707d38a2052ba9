"""A training image that cannot be decoded, in a worker: the error is one line, or the image is left out."""

import logging
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode
from PIL import Image

from kd_cls.config import get_cfg
from kd_cls.data.build import build_data, build_loaders
from kd_cls.data.images import UnreadableImage
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process
from kd_core.utils.errors import UserError

STATS = InputStats((0.5,) * 3, (0.5,) * 3, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with three training images each, of which the second of the first class is truncated."""
    for split, count in (("train", 3), ("val", 1)):
        for label in ("ant", "bee"):
            for index in range(count):
                path = tmp_path / split / label / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (20, 16), (60 * index, 90, 200)).save(path)
    broken = tmp_path / "train" / "ant" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    return tmp_path


def config(folder: Path, on_bad_image: str, workers: int) -> CfgNode:
    cfg = get_cfg()
    cfg.DATA.NAME, cfg.DATA.ROOT, cfg.DATA.AUGMENTATION, cfg.DATA.SHUFFLE = "folder", str(folder), "none", False
    cfg.DATA.BAD_IMAGES, cfg.DATA.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH = on_bad_image, workers, 2
    return cfg


def training_images(cfg: CfgNode) -> tuple[torch.Tensor, torch.Tensor]:
    batches = list(build_loaders(cfg, build_data(cfg), STATS, Process(torch.device("cpu"))).train)
    return torch.cat([images for images, _ in batches]), torch.cat([target for _, target in batches])


@pytest.mark.parametrize("workers", [0, 1])
def test_the_file_is_named_in_one_line(folder: Path, workers: int) -> None:
    with pytest.raises(UnreadableImage) as raised:
        training_images(config(folder, "error", workers))
    message = str(raised.value)
    assert message.startswith(f"{folder}/train/ant/1.png is not a readable image (") and "\n" not in message
    assert message.endswith("): replace or remove it; DATA.BAD_IMAGES skip leaves out such images of the training set")


def test_skipped_it_is_logged_once_and_the_next_image_always_takes_its_place(folder: Path, caplog) -> None:
    cfg = config(folder, "skip", 0)
    with caplog.at_level(logging.WARNING, "kd_cls"):
        loader = build_loaders(cfg, build_data(cfg), STATS, Process(torch.device("cpu"))).train
        (images, target), (again, _) = ([torch.cat(parts) for parts in zip(*loader, strict=True)] for _ in range(2))
    assert target.tolist() == [0, 0, 0, 1, 1, 1] and torch.equal(images, again)
    assert torch.equal(images[1], images[2]) and not torch.equal(images[0], images[1])
    assert [str(folder / "train/ant/1.png") in record.getMessage() for record in caplog.records] == [True]


def test_no_held_out_image_takes_the_place_of_a_broken_one(folder: Path) -> None:
    cfg = config(folder, "skip", 0)
    cfg.DATA.HELD_OUT = 3  # the images 0, 2 and 4: the last of the first class is the next after the broken one
    data = build_data(cfg)
    assert [target for _, target in data.val] == [0, 0, 1]
    assert [target for _, target in data.train] == [1, 1, 1]


def test_where_no_image_can_be_decoded_that_is_said(folder: Path) -> None:
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="not one of the 6 training images can be decoded"):
        training_images(config(folder, "skip", 0))
