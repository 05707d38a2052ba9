"""Label maps of the built-in data set: semantic and panoptic, from the same pasted digits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from PIL import Image

from kd_det.data import digits

PHOTO = len(digits.CLASS_NAMES)  # class of what is no digit: the photograph
SEM_SEG_CLASSES = (*digits.CLASS_NAMES, "photo")
STUFF_CLASSES = ("things", "photo")  # as detectron2's panoptic data sets: 0 is everything that has an instance
IGNORED = 255
PHOTO_ID = 255  # of the photograph's segment in a panoptic image; the digits are 1, 2, …


def semantic_labels(canvas: digits.InkMap, boxes: list[digits.Box]) -> np.ndarray:
    """(H, W) uint8: the class of every pixel; the blurred rim of a digit has none (IGNORED)."""
    labels = np.full(canvas.owner.shape, PHOTO, np.uint8)
    for number, box in enumerate(boxes, start=1):
        labels[canvas.owner == number] = box.label
    labels[canvas.rim] = IGNORED
    return labels


def write_maps(folder: Path, name: str, rendered: list[tuple[str, digits.InkMap, list[digits.Box]]]) -> None:
    """Write the maps of a split beside its images.

        sem_seg/<name>/*.png            classes of SEM_SEG_CLASSES
        panoptic_sem_seg/<name>/*.png   0 on digits, 1 on the photograph
        panoptic/<name>/*.png, annotations/panoptic_<name>.json, annotations/instances_<name>.json    as COCO's

    Args:
        folder: of the data set.
        name: of the split.
        rendered: file name of each image, its ink, and its digits.
    """
    folders = {kind: folder / kind / name for kind in ("sem_seg", "panoptic_sem_seg", "panoptic")}
    for path in folders.values():
        path.mkdir(parents=True)
    segments, instances, images = [], [], []
    for image_id, (file_name, canvas, boxes) in enumerate(rendered, start=1):
        png = Path(file_name).with_suffix(".png").name
        owner = canvas.owner
        ids = np.where(owner > 0, owner, PHOTO_ID)
        maps = {
            "sem_seg": semantic_labels(canvas, boxes),
            "panoptic_sem_seg": (owner == 0).astype(np.uint8),
            "panoptic": np.stack([ids, np.zeros_like(ids), np.zeros_like(ids)], axis=2),
        }
        for kind, pixels in maps.items():
            Image.fromarray(pixels).save(folders[kind] / png)
        height, width = owner.shape
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        found = [annotation(owner == number, number, box.label) for number, box in enumerate(boxes, start=1)]
        for one in found:
            instances.append({**one, "id": len(instances) + 1, "image_id": image_id})
        parts = [*found, annotation(owner == 0, PHOTO_ID, PHOTO)]
        info = [{key: value for key, value in part.items() if key != "segmentation"} for part in parts]
        segments.append({"image_id": image_id, "file_name": png, "segments_info": info})
    things = [{"id": label + 1, "name": name, "isthing": 1} for label, name in enumerate(digits.CLASS_NAMES)]
    stuff = {"id": PHOTO + 1, "name": SEM_SEG_CLASSES[PHOTO], "isthing": 0}
    write_json(folder, f"panoptic_{name}", images, segments, [*things, stuff])
    write_json(folder, f"instances_{name}", images, instances, things)


def annotation(mask: np.ndarray, number: int, label: int) -> dict[str, Any]:
    """COCO's annotation of a segment, or of an instance."""
    encoded = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    box = [float(value) for value in mask_util.toBbox(encoded)]
    segmentation = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    shared = {"id": number, "category_id": label + 1, "area": int(mask.sum()), "bbox": box, "iscrowd": 0}
    return {**shared, "segmentation": segmentation}


def write_json(folder: Path, name: str, images: list, annotations: list, categories: list) -> None:
    """A file of COCO's form."""
    path = folder / "annotations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
