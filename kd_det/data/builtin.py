"""The built-in digits in detectron2's catalogs, written to disk when first loaded: boxes, label maps, panoptic."""

import argparse
import hashlib
import json
import os
import tempfile
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock

from kd_core.utils.errors import UserError
from kd_det.data import digit_maps, digits
from kd_det.data.label_maps import label_map_records

JPEG_QUALITY = 90
DEFAULT_SEED = 0
MARKER = "generator.json"  # written last: a folder that has it is whole


def datasets_root() -> Path:
    """detectron2's root of all data sets: $DETECTRON2_DATASETS, or ./datasets."""
    return Path(os.getenv("DETECTRON2_DATASETS", "datasets")).expanduser()


def prepare_digits(root: str | os.PathLike | None = None, seed: int | None = None) -> Path:
    """Write the digits data set as JPEG + COCO json, unless it exists already, and return its folder, `root`/digits.

    The same seed gives the same images, to the byte with the same numpy and Pillow. A folder of another seed, or of
    another version of the generator, is replaced. Any number of processes may call this at once: one writes, the others
    wait, and none sees a part of a data set.

    Args:
        root: parent folder; `datasets_root()` by default
        seed: ≥ 0; by default that of the folder found, or else 0
    Raises:
        UserError: negative seed; `root`/digits holds something that was not written here, or cannot be written
    """
    if seed is not None and seed < 0:
        raise UserError(f"seed of the digits data set is {seed}; it must be 0 or more")
    folder = (Path(root) if root is not None else datasets_root()).absolute() / "digits"
    try:
        if not _is_current(folder, seed):
            with file_lock(str(folder)):
                if not _is_current(folder, seed):  # another process may have written it while this one waited
                    _replace(folder, seed)
    except OSError as error:
        if error.strerror is None:  # not the system's: a photograph is missing
            raise
        raise UserError(
            f"the digits data set cannot be written to {folder} ({error.strerror}): set DETECTRON2_DATASETS "
            "to a folder that can be written, with 40 MB free"
        ) from error
    return folder


def register_digits(root: str | os.PathLike | None = None) -> None:
    """Put every split into detectron2's catalogs, once; nothing is written before `DatasetCatalog.get`."""
    folder = (Path(root) if root is not None else datasets_root()) / "digits"
    for split in digits.SPLITS:
        if split.name in DatasetCatalog:
            continue
        json_file, image_root = str(_json_file(folder, split)), str(folder / split.name)
        DatasetCatalog.register(split.name, lambda split=split: _load(folder, split))
        MetadataCatalog.get(split.name).set(
            json_file=json_file,
            image_root=image_root,
            evaluator_type="coco",
            thing_classes=list(digits.CLASS_NAMES),
            thing_dataset_id_to_contiguous_id={_category_id(label): label for label in range(len(digits.CLASS_NAMES))},
        )


def register_digit_maps(root: str | os.PathLike | None = None) -> None:
    """Put `digits_sem_seg_<split>` and `digits_panoptic_<split>` of every split into detectron2's catalogs, once."""
    folder = (Path(root) if root is not None else datasets_root()) / "digits"
    things = {_category_id(label): label for label in range(len(digits.CLASS_NAMES))}
    for split in digits.SPLITS:
        image_root = str(folder / split.name)
        semantic, panoptic = (split.name.replace("digits", f"digits_{kind}") for kind in ("sem_seg", "panoptic"))
        if semantic in DatasetCatalog:
            continue
        DatasetCatalog.register(semantic, lambda split=split: _load_maps(folder, split))
        MetadataCatalog.get(semantic).set(
            image_root=image_root,
            sem_seg_root=str(folder / "sem_seg" / split.name),
            evaluator_type="sem_seg",
            ignore_label=digit_maps.IGNORED,
            stuff_classes=list(digit_maps.SEM_SEG_CLASSES),
        )
        DatasetCatalog.register(panoptic, lambda split=split, name=panoptic: _load_panoptic(folder, split, name))
        MetadataCatalog.get(panoptic).set(
            image_root=image_root,
            json_file=str(folder / "annotations" / f"instances_{split.name}.json"),
            panoptic_json=str(folder / "annotations" / f"panoptic_{split.name}.json"),
            panoptic_root=str(folder / "panoptic" / split.name),
            sem_seg_root=str(folder / "panoptic_sem_seg" / split.name),
            evaluator_type="coco_panoptic_seg",
            ignore_label=digit_maps.IGNORED,
            thing_classes=list(digits.CLASS_NAMES),
            stuff_classes=list(digit_maps.STUFF_CLASSES),
            thing_dataset_id_to_contiguous_id=things,
            stuff_dataset_id_to_contiguous_id={0: 0, _category_id(digit_maps.PHOTO): 1},
        )


def _load_maps(folder: Path, split: digits.Split) -> list[dict]:
    prepare_digits(folder.parent)
    return label_map_records(folder / split.name, folder / "sem_seg" / split.name)


def _load_panoptic(folder: Path, split: digits.Split, name: str) -> list[dict]:
    prepare_digits(folder.parent)
    records = load_coco_json(MetadataCatalog.get(name).json_file, str(folder / split.name), name)
    labels = folder / "panoptic_sem_seg" / split.name
    return [{**r, "sem_seg_file_name": str(labels / f"{Path(r['file_name']).stem}.png")} for r in records]


def is_builtin(name: str) -> bool:
    """Whether a data set's files are written when it is first loaded."""
    splits = {split.name for split in digits.SPLITS}
    return name.replace("_sem_seg", "").replace("_panoptic", "") in splits


def _load(folder: Path, split: digits.Split) -> list[dict]:
    prepare_digits(folder.parent)
    return load_coco_json(str(_json_file(folder, split)), str(folder / split.name), split.name)


def _json_file(folder: Path, split: digits.Split) -> Path:
    return folder / "annotations" / f"{split.name}.json"


def _category_id(label: int) -> int:
    return label + 1  # COCO counts from 1; detectron2 warns of any other range


def _fingerprint(seed: int | None) -> dict:
    """What the images depend on: when the generator's source changes, they are written again."""
    sources = [Path(digits.__file__), Path(digit_maps.__file__), Path(__file__)]
    return {"seed": seed, "source_sha256": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()}


def _is_current(folder: Path, seed: int | None) -> bool:
    found = _marker(folder)
    return bool(found) and found == _fingerprint(found.get("seed") if seed is None else seed)


def _marker(folder: Path) -> dict | None:
    """The fingerprint in the folder; empty where it cannot be read, None where there is none."""
    try:
        return json.loads((folder / MARKER).read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:
        return {}


def _replace(folder: Path, seed: int | None) -> None:
    """Write a new folder beside the old one, then put it in its place."""
    found = _marker(folder)
    if found is None and folder.exists():
        raise UserError(f"{folder} was not written by kd_det: move it away, or set another DETECTRON2_DATASETS")
    if seed is None:
        seed = (found or {}).get("seed", DEFAULT_SEED)
    with tempfile.TemporaryDirectory(prefix=".digits-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        for split in digits.SPLITS:
            _write_split(new, split, seed)
        (new / MARKER).write_text(json.dumps(_fingerprint(seed), indent=1))
        if folder.exists():
            folder.rename(Path(scratch) / "old")  # goes with the scratch folder
        new.rename(folder)


def _write_split(folder: Path, split: digits.Split, seed: int) -> None:
    images, annotations, maps = [], [], []
    (folder / split.name).mkdir(parents=True)
    for index in range(split.num_images):
        image, boxes, ink = digits.render_with_ink(split, index, seed)
        image_id, file_name = index + 1, f"{index:06d}.jpg"
        image.save(folder / split.name / file_name, quality=JPEG_QUALITY)
        images.append({"id": image_id, "file_name": file_name, "height": image.height, "width": image.width})
        maps.append((file_name, ink, boxes))
        annotations += [_annotation(len(annotations) + i, image_id, box) for i, box in enumerate(boxes, start=1)]
    categories = [{"id": _category_id(label), "name": name} for label, name in enumerate(digits.CLASS_NAMES)]
    info = {"description": f"{split.name}: load_digits (scikit-learn) on photographs (scikit-image), seed {seed}"}
    _json_file(folder, split).parent.mkdir(exist_ok=True)
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    _json_file(folder, split).write_text(json.dumps(content))
    digit_maps.write_maps(folder, split.name, maps)


def _annotation(annotation_id: int, image_id: int, box: digits.Box) -> dict:
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": _category_id(box.label),
        "bbox": [box.x, box.y, box.width, box.height],
        "area": box.width * box.height,
        "iscrowd": 0,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kd_det.data", description=prepare_digits.__doc__.splitlines()[0])
    parser.add_argument("--root", help="parent folder (default: $DETECTRON2_DATASETS, or ./datasets)")
    parser.add_argument("--seed", type=int, help="default: that of the data set found there, or else 0")
    options = parser.parse_args(arguments)
    try:
        print(prepare_digits(options.root, options.seed))
    except ValueError as error:
        parser.error(str(error))
