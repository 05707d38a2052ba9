"""Checks a classification data set before training: every file decodes, and no image is in two splits."""

from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from kd_cls.data.datasets import DataSets, create_datasets
from kd_cls.data.images import read_rgb
from kd_core.utils.data_check import DataReport, file_digest, in_parallel, report_shared


def check_images(name: str, root: str | Path, workers: int = 0) -> tuple[DataReport, str]:
    """Check every image of both splits of a data set.

    Args:
        name: DATA.NAME: "folder" for `root/train/<class>/` and `root/val/<class>/`, or another of `create_datasets`.
    Returns:
        The problems, and a one-line description of the data set.
    Raises:
        ValueError: no such folder, no class in it, an empty class, or other classes in validation.
    """
    sets = create_datasets(name, root)
    report, digests = DataReport(), {}
    if sets.num_classes == 1:
        report.problem("a single class", f"{sets.train.classes[0]}: there is nothing to tell apart")
    for split, dataset in zip(("train", "val"), (sets.train, sets.val), strict=True):
        if (samples := getattr(dataset, "samples", None)) is None:
            report.remark("split that is not made of image files (not checked)", split)
            continue
        digests[split] = check_split(split, samples, report, workers)
        for label, count in Counter(dict.fromkeys(range(sets.num_classes), 0) | Counter(t for _, t in samples)).items():
            if not count:
                report.problem("class without an image", f"{sets.train.classes[label]} in {split}")
    report_shared(report, digests)
    for path in unread_images(Path(root)) if digests else ():
        report.remark("image file of a format that is not read (ignored)", str(path))
    return report, describe(root or name, sets)


def check_split(split: str, samples: list[tuple[str, int]], report: DataReport, workers: int) -> dict[str, str]:
    """Decode the images of a split; returns {digest: path} of the valid ones, and reports the others."""
    paths, digests = [path for path, _ in samples], {}
    for path, (error, digest) in zip(paths, in_parallel(check_image, paths, workers), strict=True):
        if error:
            report.problem(f"{split} image that cannot be decoded", error)
        elif digest in digests:
            report.remark(f"the same image twice in {split}", f"{path} and {digests[digest]}")
        else:
            digests[digest] = path
    return digests


def check_image(path: str) -> tuple[str, str]:
    """(the problem with the image or "", its digest or "")."""
    try:
        read_rgb(path)
    except ValueError as error:
        return str(error), ""
    return "", file_digest(path)


def unread_images(root: Path) -> list[Path]:
    """Image files whose suffix torchvision does not read."""
    suffixes = {".heic", ".heif", ".avif", ".jfif", ".gif", ".jp2"} - set(IMG_EXTENSIONS)
    return sorted(path for path in root.rglob("*") if path.suffix.lower() in suffixes)


def describe(root: str | Path, sets: DataSets) -> str:
    """Number of images and classes in one line."""
    train, val = len(sets.train), len(sets.val)
    return f"{root}: {train} training and {val} validation images of {sets.num_classes} classes"
