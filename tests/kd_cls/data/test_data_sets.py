"""Every data set read as published, from small real files, and each way they can be broken named."""

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers import HELPERS
from kd_cls.data import DATASETS, create_datasets, dataset_statistics, default_augmentation
from kd_cls.data.images import read_rgb
from kd_cls.data.statistics import CIFAR100_MEAN, CIFAR100_STD
from kd_core.utils.errors import UserError


def write_image(path: Path, value: int = 100, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (10, 8), (value, value, value)).convert(mode).save(path)
    return path


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes, two training images and one validation image each."""
    for number, name in enumerate(("ant", "bee")):
        for image in range(2):
            write_image(tmp_path / "train" / name / f"{image}.png", 10 * number + image)
        write_image(tmp_path / "val" / name / "0.png", 100 + number)
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny-ImageNet's layout with three classes, whose validation labels are not in the order of the classes."""
    for wnid in ("n03", "n01", "n02"):
        write_image(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("0 0 9 7\n")
    lines = []
    for number, wnid in enumerate(("n02", "n03", "n01")):
        write_image(tmp_path / "val" / "images" / f"val_{number}.JPEG", mode="L")
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t9\t7\n")
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    """CUB-200-2011's files with two classes: images 1 and 3 for training, 2 and 4 for the test."""
    root = tmp_path / "CUB_200_2011"
    names = ["001.Crow/a.jpg", "001.Crow/b.jpg", "002.Wren/a.jpg", "002.Wren/b.jpg"]
    for name in names:
        write_image(root / "images" / name)
    files = {
        "classes.txt": "1 001.Crow\n2 002.Wren\n",
        "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
        "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
        "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n",
    }
    for name, text in files.items():
        (root / name).write_text(text)
    return root


def test_digits_need_no_files_and_no_image_is_in_both_splits() -> None:
    train, val, num_classes = create_datasets("digits")
    assert (len(train), len(val), num_classes) == (1198, 599, 10)
    image, target = train[0]
    assert (image.mode, image.size, target) == ("RGB", (32, 32), 0)
    seen = {np.asarray(train[i][0]).tobytes() for i in range(len(train))}
    assert not seen & {np.asarray(val[i][0]).tobytes() for i in range(len(val))}


def test_digits_are_balanced_and_their_statistics_are_measured() -> None:
    train, val, _ = create_datasets("digits")
    for split in (train, val):
        counts = np.bincount(split.targets)
        assert counts.min() > 0.09 * len(split) and counts.max() < 0.11 * len(split)
    pixels = np.stack([np.asarray(train[i][0]) for i in range(len(train))]) / 255
    mean, std = dataset_statistics("digits")
    assert pixels.mean() == pytest.approx(mean[0], abs=0.005)
    assert pixels.std() == pytest.approx(std[0], abs=0.005)


def test_a_folder_of_classes_is_read_in_alphabetical_order(folders: Path) -> None:
    data = create_datasets("folder", folders)
    assert (data.num_classes, data.train.classes, len(data.train), len(data.val)) == (2, ["ant", "bee"], 4, 2)
    assert [(np.asarray(image).max(), target) for image, target in data.train] == [(0, 0), (1, 0), (10, 1), (11, 1)]
    assert [(np.asarray(image).max(), target) for image, target in data.val] == [(100, 0), (101, 1)]


def test_a_validation_folder_may_have_the_other_usual_names(folders: Path) -> None:
    (folders / "val").rename(folders / "validation")
    (folders / "train").rename(folders / "training")
    assert len(create_datasets("folder", folders).val) == 2


@pytest.mark.parametrize("name", ["torch/image_folder", "any/folder"])  # torchvision's data set, and timm's own
def test_timms_names_are_read_by_timm(folders: Path, name: str) -> None:
    data = create_datasets(name, folders)
    assert (data.num_classes, data.train.classes, len(data.train), len(data.val)) == (2, ["ant", "bee"], 4, 2)
    assert (data.val[1][0].mode, data.val[1][1]) == ("RGB", 1)
    assert default_augmentation(name) == "imagenet"
    assert dataset_statistics(name) == dataset_statistics("imagenet")


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("P", "png"), ("LA", "png"), ("CMYK", "jpg"), ("1", "png")])
def test_grey_palette_and_cmyk_images_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    image = read_rgb(write_image(tmp_path / f"a.{suffix}", 255, mode))
    assert image.mode == "RGB" and np.asarray(image).min() > 250


def test_images_of_sixteen_bits_are_scaled_and_those_of_unknown_range_named(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 80).reshape(8, 10)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "a.png"))[..., 0], (values.astype(np.uint16) / 257).round())
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff is not a readable image \(pixels of 32 bits, mode F: save it "):
        read_rgb(tmp_path / "a.tiff")


def half_an_image(format: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    return buffer.getvalue()[: buffer.tell() // 2]


@pytest.mark.parametrize("content", [b"", b"no image", half_an_image("jpeg"), half_an_image("png"), b"P6 4o 40 255 "])
def test_a_broken_image_is_named(folders: Path, content: bytes) -> None:
    (folders / "train" / "ant" / "0.png").write_bytes(content)
    train = create_datasets("folder", folders).train
    with pytest.raises(UserError, match=r"train/ant/0\.png is not a readable image \(.+\): replace or remove it"):
        train[0]
    assert train[1][1] == 0


def test_an_empty_class_folder_is_named(folders: Path) -> None:
    (folders / "train" / "cow").mkdir()
    (folders / "train" / "cow" / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"class folder without an image: .*train/cow\. Add images"):
        create_datasets("folder", folders)


def test_splits_of_different_classes_are_refused(folders: Path) -> None:
    (folders / "val" / "bee").rename(folders / "val" / "cow")
    with pytest.raises(UserError, match=r"only in training: \['bee'\], only in validation: \['cow'\]"):
        create_datasets("folder", folders)


@pytest.mark.parametrize("name", ["imagenet", "folder"])
def test_a_missing_folder_says_what_is_expected_where(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"no folder .*nowhere/train: expected .*nowhere/train/<class>/\*\.jpg"):
        create_datasets(name, tmp_path / "nowhere")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"no class folders in .*/train: expected"):
        create_datasets(name, tmp_path)


def test_missing_cifar100_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'cifar100': .* DATA.ROOT .* \(Dataset not found .* or DATA.DOWNLOAD True"):
        create_datasets("cifar100", tmp_path)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"'cifar' is unknown: choose one of cifar100, .*cub200, digits, .*torch/cifar10"
    ):
        create_datasets("cifar")


def test_tiny_imagenets_validation_labels_come_from_the_published_file(tiny: Path) -> None:
    data = create_datasets("tiny_imagenet", tiny)
    assert (data.num_classes, data.train.classes) == (3, ["n01", "n02", "n03"])
    assert data.val.targets == [1, 2, 0]
    assert data.val[0][0].mode == "RGB"


def test_tiny_imagenets_validation_may_be_sorted_into_folders(tiny: Path) -> None:
    (tiny / "val" / "val_annotations.txt").unlink()
    for number, wnid in enumerate(("n02", "n03", "n01")):
        (tiny / "val" / wnid).mkdir()
        (tiny / "val" / "images" / f"val_{number}.JPEG").rename(tiny / "val" / wnid / f"val_{number}.JPEG")
    (tiny / "val" / "images").rmdir()
    assert [target for _, target in create_datasets("tiny_imagenet", tiny).val] == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_0.JPEG\tn99\t0\t0\t9\t7", "line 2: class 'n99' has no folder"),
        ("val_0.JPEG", "line 2: expected at least 2 columns, got 'val_0.JPEG'"),
        ("val_9.JPEG\tn01\t0\t0\t9\t7", r"1 of 2 images of .*val_annotations.txt are missing, the first: .*val_9.JPEG"),
    ],
)
def test_a_wrong_line_of_tiny_imagenet_is_named(tiny: Path, line: str, message: str) -> None:
    (tiny / "val" / "val_annotations.txt").write_text(f"val_0.JPEG\tn01\t0\t0\t9\t7\n{line}\n")
    with pytest.raises(UserError, match=message):
        create_datasets("tiny_imagenet", tiny)


def test_missing_tiny_imagenet_says_how_it_is_published(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Tiny-ImageNet is expected as published, with train/<wnid>/images"):
        create_datasets("tiny_imagenet", tmp_path)


def test_cub_is_split_by_its_own_file(cub: Path) -> None:
    for root in (cub, cub.parent):
        data = create_datasets("cub200", root)
        assert (data.num_classes, data.train.classes) == (2, ["001.Crow", "002.Wren"])
        assert [Path(path).name for path, _ in data.train.samples] == ["a.jpg", "a.jpg"]
        assert [Path(path).name for path, _ in data.val.samples] == ["b.jpg", "b.jpg"]
        assert data.train.targets == data.val.targets == [0, 1]
        assert data.val[0][0].mode == "RGB"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train_test_split.txt", "1 1\n2 0\n3 1\n", r"train_test_split.txt has no line for image 4 \(002.Wren/b.jpg\)"),
        ("train_test_split.txt", "1 1\n2 0\n3 7\n4 0\n", "its split '7' be 1"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 3\n", "class '3' must be in classes.txt"),
        (
            "images.txt",
            "1 001.Crow/a.jpg\n2 001.Crow/lost.jpg\n",
            r"1 of 2 images of .* are missing, the first: .*lost.jpg",
        ),
        ("classes.txt", None, r"no file .*classes.txt: CUB-200-2011 is expected as published"),
    ],
)
def test_a_wrong_file_of_cub_is_named(cub: Path, file: str, text: str | None, message: str) -> None:
    (cub / file).unlink() if text is None else (cub / file).write_text(text)
    with pytest.raises(UserError, match=message):
        create_datasets("cub200", cub)


def test_every_data_set_has_the_papers_augmentation_and_statistics() -> None:
    expected = {
        "cifar100": "cifar",
        "cub200": "imagenet",
        "digits": "digits",
        "folder": "imagenet",
        "imagenet": "imagenet",
        "tiny_imagenet": "imagenet",
    }
    ours = {name: entry for name, entry in DATASETS.items() if entry.build.__module__.startswith("kd_cls.")}
    assert {name: entry.augmentation for name, entry in ours.items()} == expected  # other tests register theirs
    assert dataset_statistics("cifar100") == (CIFAR100_MEAN, CIFAR100_STD)


def test_the_real_tiny_imagenet_is_read_grey_images_included(shared_dir: Path) -> None:
    root = shared_dir / "data" / "tiny-imagenet-200x10"
    train, val, num_classes = create_datasets("tiny_imagenet", root)
    assert (len(train), len(val), num_classes) == (2000, 2000, 200)
    assert sorted(train.classes) == sorted((root / "wnids.txt").read_text().split())
    assert np.bincount(val.targets).tolist() == [10] * 200
    grey = [index for index, (path, _) in enumerate(train.samples) if Image.open(path).mode == "L"]
    assert grey and all(train[index][0].mode == "RGB" for index in grey)


def test_the_real_cifar100_has_the_papers_statistics(shared_dir: Path) -> None:
    spec = importlib.util.spec_from_file_location("cifar100_reader", HELPERS / "cifar100_reader.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    train, val, num_classes = create_datasets("cifar100_strips", shared_dir / "data" / "cifar100")
    assert (len(train), len(val), num_classes) == (50_000, 10_000, 100)
    assert train.targets[:5] == [19, 29, 0, 11, 1]  # the official order
    values = np.arange(256) / 255
    for channel, (mean, std) in enumerate(zip(CIFAR100_MEAN, CIFAR100_STD, strict=True)):
        counts = np.bincount(train.images[..., channel].ravel(), minlength=256)
        measured = np.average(values, weights=counts)
        assert measured == pytest.approx(mean, abs=5e-4)
        assert np.average((values - measured) ** 2, weights=counts) ** 0.5 == pytest.approx(std, abs=5e-4)
    assert default_augmentation("cifar100_strips") == "cifar"
