"""Tiny-ImageNet and CUB-200-2011 as published, with labels or splits in text files."""

from pathlib import Path

from torch.utils.data import Dataset

from kd_cls.data.images import ImageList, class_folder
from kd_core.utils.errors import UserError

TINY_LAYOUT = (
    "Tiny-ImageNet is expected as published, with train/<wnid>/images/*.JPEG, val/images/*.JPEG and "
    "val/val_annotations.txt under DATA.ROOT"
)
CUB_LAYOUT = (
    "CUB-200-2011 is expected as published, with images.txt, image_class_labels.txt, train_test_split.txt, classes.txt "
    "and images/ in DATA.ROOT or in DATA.ROOT/CUB_200_2011"
)


def tiny_imagenet(root: Path) -> tuple[Dataset, Dataset]:
    """Training and validation images of Tiny-ImageNet; classes in alphabetical order of their WordNet ids.

    A `val/` that has been sorted into class folders is read too.
    """
    train = class_folder(root / "train", TINY_LAYOUT)
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return train, class_folder(root / "val", TINY_LAYOUT)
    index = {wnid: i for i, wnid in enumerate(train.classes)}
    samples = []
    for number, (name, wnid, *_box) in enumerate(_rows(annotations, columns=2, layout=TINY_LAYOUT), start=1):
        if wnid not in index:
            raise UserError(f"{annotations}, line {number}: class {wnid!r} has no folder in {root / 'train'}")
        samples.append((str(root / "val" / "images" / name), index[wnid]))
    _check_files(samples, annotations)
    return train, ImageList(samples, train.classes)


def cub200(root: Path) -> tuple[Dataset, Dataset]:
    """The 5,994 training and 5,794 test images of CUB-200-2011, split by its train_test_split.txt."""
    if (root / "CUB_200_2011").is_dir():
        root = root / "CUB_200_2011"
    paths = _table(root / "images.txt")
    labels = _table(root / "image_class_labels.txt")
    is_train = _table(root / "train_test_split.txt")
    names = _table(root / "classes.txt")
    order = {number: index for index, number in enumerate(names)}
    splits: dict[str, list[tuple[str, int]]] = {"1": [], "0": []}
    for image, path in paths.items():
        for table, file in ((labels, "image_class_labels.txt"), (is_train, "train_test_split.txt")):
            if image not in table:
                raise UserError(f"{root / file} has no line for image {image} ({path}) of images.txt")
        if labels[image] not in order or is_train[image] not in splits:
            raise UserError(
                f"image {image} ({path}) in {root}: class {labels[image]!r} must be in classes.txt and its split "
                f"{is_train[image]!r} be 1 (training) or 0 (test)"
            )
        splits[is_train[image]].append((str(root / "images" / path), order[labels[image]]))
    _check_files(splits["1"] + splits["0"], root / "images.txt")
    return ImageList(splits["1"], list(names.values())), ImageList(splits["0"], list(names.values()))


def _table(file: Path) -> dict[str, str]:
    """CUB's `<number> <value>` lines, in the order of the file."""
    return {number: value for number, value, *_ in _rows(file, columns=2, layout=CUB_LAYOUT)}


def _rows(file: Path, columns: int, layout: str) -> list[list[str]]:
    if not file.is_file():
        raise UserError(f"no file {file}: {layout}")
    rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
    for number, row in enumerate(rows, start=1):
        if len(row) < columns:
            raise UserError(f"{file}, line {number}: expected at least {columns} columns, got {' '.join(row)!r}")
    return rows


def _check_files(samples: list[tuple[str, int]], listed_in: Path) -> None:
    missing = [path for path, _ in samples if not Path(path).is_file()]
    if missing:
        raise UserError(f"{len(missing)} of {len(samples)} images of {listed_in} are missing, the first: {missing[0]}")
