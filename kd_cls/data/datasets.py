"""Data sets by name: the papers', the built-in digits, any folder of classes, and those of timm's `create_dataset`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from timm.data import create_dataset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset, IterableDataset

from kd_cls.data.digits import Digits
from kd_cls.data.images import class_folder
from kd_cls.data.published_splits import cub200, tiny_imagenet
from kd_cls.data.statistics import CIFAR100_MEAN, CIFAR100_STD
from kd_core.utils.errors import UserError

TRAIN_FOLDERS = ("train", "training")
VAL_FOLDERS = ("val", "validation", "valid", "eval", "test")
FOLDER_LAYOUT = "expected {root}/train/<class>/*.jpg and {root}/val/<class>/*.jpg; set DATA.ROOT to the folder of both"


class DataSets(NamedTuple):
    """Two map-style data sets with the same list of classes."""

    train: Dataset
    val: Dataset
    num_classes: int


class Entry(NamedTuple):
    """A named data set: how to build its two splits, how the papers augment it, and its channel statistics."""

    build: Callable[..., tuple[Dataset, Dataset]]
    augmentation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


DATASETS: dict[str, Entry] = {}


def register_dataset(
    name: str,
    *,
    augmentation: str = "imagenet",
    mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
) -> Callable:
    """Decorator that adds a data set: a function (root: Path, download: bool) → (training set, validation set).

    Both must be map-style, give (RGB image, class index), and have `transform` and `classes`.
    """

    def register(build: Callable[..., tuple[Dataset, Dataset]]) -> Callable[..., tuple[Dataset, Dataset]]:
        DATASETS[name] = Entry(build, augmentation, mean, std)
        return build

    return register


def create_datasets(
    name: str,
    root: str | Path = "",
    *,
    download: bool = False,
    train_split: str = "train",
    val_split: str = "validation",
) -> DataSets:
    """The training and validation set called `name`.

    Args:
        name: a key of `DATASETS`, or a prefixed name of timm's `create_dataset` ("torch/…", "hfds/…").
        root: the folder of the images; "digits" needs none.
        download: let torchvision download it if it can ("cifar100").
        train_split, val_split: names of the splits, for timm's names only.

    Raises:
        UserError: an unknown name; missing files (the message says which layout is expected); an empty class folder; a
            validation set with other classes than the training set.
    """
    root = Path(root).expanduser()
    if name in DATASETS:
        train, val = DATASETS[name].build(root, download)
    elif "/" in name:
        train, val = (_timm_dataset(name, root, split, download) for split in (train_split, val_split))
    else:
        raise UserError(
            f"DATA.NAME {name!r} is unknown: choose one of {', '.join(sorted(DATASETS))}, or a prefixed name of timm's "
            "create_dataset such as torch/cifar10"
        )
    _check_classes(name, train.classes, val.classes)
    return DataSets(train, val, len(train.classes))


def default_augmentation(name: str) -> str:
    """The papers' augmentation of a data set, a key of `AUGMENTATIONS`; "imagenet" for timm's names."""
    return DATASETS[name].augmentation if name in DATASETS else "imagenet"


def dataset_statistics(name: str) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """The papers' channel (mean, std) of a data set, for pixel values in [0, 1]; ImageNet's for timm's names."""
    entry = DATASETS.get(name)
    return (entry.mean, entry.std) if entry else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


@register_dataset("digits", augmentation="digits", mean=(0.31,) * 3, std=(0.35,) * 3)  # measured on its training images
def _digits(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    return Digits(train=True), Digits(train=False)


@register_dataset("cifar100", augmentation="cifar", mean=CIFAR100_MEAN, std=CIFAR100_STD)
def _cifar100(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    splits, timms_name = ("train", "validation"), "torch/cifar100"
    train, val = (_timm_dataset("cifar100", root, split, download, timms_name) for split in splits)
    return train, val


@register_dataset("tiny_imagenet")
def _tiny_imagenet(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    return tiny_imagenet(root)


@register_dataset("cub200")
def _cub200(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    return cub200(root)


@register_dataset("imagenet")
@register_dataset("folder")
def _folders(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    """`root/train` and `root/val`, or timm's other names for them."""
    expected = FOLDER_LAYOUT.format(root=root)
    train, val = (
        class_folder(next((root / name for name in names if (root / name).is_dir()), root / names[0]), expected)
        for names in (TRAIN_FOLDERS, VAL_FOLDERS)
    )
    return train, val


def _timm_dataset(name: str, root: Path, split: str, download: bool, timms_name: str = "") -> Dataset:
    """One split by timm's `create_dataset`, whose various exceptions become one UserError; `name` is DATA.NAME."""
    try:
        dataset = create_dataset(timms_name or name, root=str(root), split=split, download=download)
    except (RuntimeError, AssertionError, OSError, ImportError, ValueError) as error:
        raise UserError(
            f"DATA.NAME {name!r}: cannot read split {split!r} from DATA.ROOT {str(root)!r} ({error}). Set DATA.ROOT to "
            "the folder that holds it, or DATA.DOWNLOAD True"
        ) from error
    if isinstance(dataset, IterableDataset):
        raise UserError(f"DATA.NAME {name!r} is a stream, whose order cannot be resumed: use a data set with an index")
    if not hasattr(dataset, "classes"):
        dataset.classes = _class_names(name, dataset)
    return dataset


def _class_names(name: str, dataset: Dataset) -> list[str]:
    """Class names of a timm `ImageDataset`, from its reader."""
    mapping = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if not mapping:
        raise UserError(f"DATA.NAME {name!r} has no class names: use a data set that has them")
    return [label for label, _ in sorted(mapping.items(), key=lambda item: item[1])]


def _check_classes(name: str, train: list[str], val: list[str]) -> None:
    """Refuse splits with different classes: their class indices would not agree."""
    if list(train) != list(val):
        lost, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
        raise UserError(
            f"data set {name!r}: {len(train)} classes for training, {len(val)} for validation; "
            f"only in training: {lost[:3]}, only in validation: {extra[:3]}. Both splits need the same class folders"
        )
