"""COCO files with one thing wrong each: what is reported, what a training refuses, and what the cleaned json keeps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kd_core.utils.errors import UserError
from kd_det.data.check import CocoFile, check_coco, refuse_broken


def content(images: int = 3) -> dict[str, Any]:
    """A json of two categories whose ids have gaps, with one box in each image."""
    return {
        "images": [{"id": 10 * i, "file_name": f"{i}.jpg", "width": 40, "height": 30} for i in range(images)],
        "annotations": [
            {"id": i + 1, "image_id": 10 * i, "category_id": (3, 17)[i % 2], "bbox": [2, 3, 20, 10], "iscrowd": 0}
            for i in range(images)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}],
    }


@pytest.fixture
def written(tmp_path: Path) -> Callable[[dict[str, Any]], tuple[Path, Path]]:
    """`written(content)`: json file and image folder, with an image for each entry."""

    def write(data: dict[str, Any], name: str = "data", shade: int = 0) -> tuple[Path, Path]:
        folder = tmp_path / name
        folder.mkdir()
        for index, image in enumerate(data["images"]):
            if isinstance(image, dict) and isinstance(image.get("file_name"), str):
                Image.new("RGB", (40, 30), (shade, 40 * index, 0)).save(folder / image["file_name"])
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        return path, folder

    return write


def checked(path: Path, folder: Path) -> CocoFile:
    file = CocoFile(path, folder)
    file.check_structure()
    file.check_files(workers=1)
    return file


def test_a_sound_data_set_has_no_problems_though_its_category_ids_have_gaps(written):
    file = checked(*written(content()))
    assert file.report.problems == {} and file.report.remarks == {}
    assert file.cleaned() == content()


def test_lvis_names_its_images_by_their_address(written):
    path, folder = written(content())
    data = content()
    for image in data["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/{folder.name}/{image.pop('file_name')}"
    path.write_text(json.dumps(data))
    refuse_broken("DATASETS.TRAIN", "lvis", str(path), str(folder.parent))
    (folder / "0.jpg").unlink()
    with pytest.raises(UserError, match=r"image file missing.*data/0\.jpg"):
        refuse_broken("DATASETS.TRAIN", "lvis", str(path), str(folder.parent))


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str, bool]] = {
    # what is done to the json → kind of the problem, a word of the place, whether a training refuses it
    "unknown category": (
        lambda c: c["annotations"][1].update(category_id=4),
        "annotation of an unknown category",
        "annotations[1], category_id 4",
        True,
    ),
    "negative box": (
        lambda c: c["annotations"][2].update(bbox=[5, 5, -3, 4]),
        "box of negative size",
        "annotations[2]",
        True,
    ),
    "flat box": (lambda c: c["annotations"][0].update(bbox=[5, 5, 0, 4]), "box without area", "annotations[0]", False),
    "box outside": (
        lambda c: c["annotations"][0].update(bbox=[30, 5, 20, 4]),
        "box that reaches out of its image (clipped in training)",
        "of 40 × 30",
        False,
    ),
    "nan box": (
        lambda c: c["annotations"][0].update(bbox=[5, 5, float("nan"), 4]),
        "entry without what it needs",
        "four numbers",
        True,
    ),
    "null box": (
        lambda c: c["annotations"][0].update(bbox=None),
        "entry without what it needs",
        "not four numbers",
        True,
    ),
    "no bbox": (lambda c: c["annotations"][0].pop("bbox"), "entry without what it needs", "has no bbox", True),
    "no size": (lambda c: c["images"][1].pop("width"), "entry without what it needs", "images[1] has no width", True),
    "size as text": (
        lambda c: c["images"][1].update(width="40"),
        "entry without what it needs",
        'images[1] has width "40", not a length',
        True,
    ),
    "null size": (lambda c: c["images"][1].update(height=None), "entry without what it needs", "height null", True),
    "name no text": (lambda c: c["images"][1].update(file_name=0), "entry without what it needs", "name 0", True),
    "image no object": (lambda c: c["images"].append(7), "entry without what it needs", "images[3] is no object", True),
    "id a list": (
        lambda c: c["annotations"][1].update(image_id=[1]),
        "entry without what it needs",
        "image_id [1], not an id",
        True,
    ),
    "no annotation id": (
        lambda c: c["annotations"][1].pop("id"),
        "annotation without an id",
        "annotations[1], image 10",
        True,
    ),
    "same annotation id": (
        lambda c: c["annotations"][1].update(id=1),
        "annotation id used twice",
        "annotations[1], id 1",
        True,
    ),
    "same image id": (lambda c: c["images"][1].update(id=0), "image id used twice", "images[1], id 0", True),
    "unlisted image": (
        lambda c: c["annotations"][1].update(image_id=999),
        "annotation of an image that is not listed",
        "image 999",
        False,
    ),
    "other size": (
        lambda c: c["images"][1].update(width=41),
        "image of another size than the json says",
        "40 × 30, the json says 41 × 30",
        False,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_kind_of_fault_is_named_with_its_place_and_is_gone_from_the_cleaned_json(name, written, tmp_path):
    break_it, kind, place, _ = BROKEN[name]
    data = content()
    break_it(data)
    path, folder = written(data)
    report = checked(path, folder).report
    assert list(report.problems) == [kind] or kind in report.problems
    assert place in report.problems[kind][0]
    cleaned = tmp_path / "cleaned.json"
    cleaned.write_text(json.dumps(checked(path, folder).cleaned()))
    assert checked(cleaned, folder).report.problems == {}


@pytest.mark.parametrize("name", BROKEN)
def test_a_training_refuses_what_would_stop_it_and_nothing_else(name, written):
    break_it, kind, _, refused = BROKEN[name]
    data = content()
    break_it(data)
    path, folder = written(data)
    if not refused:
        refuse_broken("DATASETS.TRAIN", "mine", str(path), str(folder))
        return
    with pytest.raises(UserError, match=r"^DATASETS\.TRAIN: mine: " + kind) as raised:
        refuse_broken("DATASETS.TRAIN", "mine", str(path), str(folder))
    assert "tools/check_data.py" in str(raised.value)


def test_missing_images_are_counted_and_the_first_three_named(written):
    path, folder = written(content(6))
    for index in (1, 2, 3, 5):
        (folder / f"{index}.jpg").unlink()
    with pytest.raises(UserError, match=r"image file missing \(4\): .*1\.jpg; .*2\.jpg; .*3\.jpg, and 1 more"):
        refuse_broken("DATASETS.TRAIN", "mine", str(path), str(folder))


def test_a_truncated_jpeg_is_named_and_cleaned_away(written):
    path, folder = written(content())
    whole = (folder / "1.jpg").read_bytes()
    (folder / "1.jpg").write_bytes(whole[: len(whole) // 2])
    file = checked(path, folder)
    assert "1.jpg" in file.report.problems["image that cannot be decoded"][0]
    assert [image["file_name"] for image in file.cleaned()["images"]] == ["0.jpg", "2.jpg"]
    assert [annotation["image_id"] for annotation in file.cleaned()["annotations"]] == [0, 20]


def test_an_image_that_stands_in_two_splits_is_found_by_its_bytes(written):
    train, val = written(content(), "train", shade=0), written(content(2), "val", shade=200)
    (val[1] / "1.jpg").write_bytes((train[1] / "2.jpg").read_bytes())
    _, together = check_coco([train, val])
    (place,) = together.problems["the same image in two splits"]
    assert "2.jpg" in place and "1.jpg" in place


def test_images_without_annotations_and_categories_without_boxes_are_remarked(written):
    data = content()
    del data["annotations"][1]
    report = checked(*written(data)).report
    assert report.problems == {}
    assert report.remarks == {
        "image without annotations (not trained on)": ["id 10"],
        "category without annotations": ["dog (id 17)"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no json that can be read"),
        ("[]", "it has no list of images, annotations, categories"),
        (json.dumps({**content(), "annotations": []}), "has no annotations"),
        (json.dumps({**content(), "categories": None}), "it has no list of categories"),
    ],
)
def test_a_file_that_is_no_coco_json_is_told_in_one_sentence(text, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        CocoFile(path, tmp_path)
