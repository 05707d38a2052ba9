"""tools/voc_to_coco.py on a small tree with every oddity that real VOC trees have, and on a real data set."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from kd_core.utils.errors import UserError
from kd_det.data.voc import EXIF_ORIENTATION

TOOL = Path(__file__).resolve().parents[2] / "tools" / "voc_to_coco.py"
spec = importlib.util.spec_from_file_location("voc_to_coco", TOOL)
voc_to_coco = importlib.util.module_from_spec(spec)
spec.loader.exec_module(voc_to_coco)


def voc_object(name: str, *edges: float, difficult: int = 0, truncated: int = 0) -> str:
    box = "".join(f"<{tag}>{edge}</{tag}>" for tag, edge in zip(("xmin", "ymin", "xmax", "ymax"), edges, strict=True))
    flags = f"<difficult>{difficult}</difficult><truncated>{truncated}</truncated>"
    return f"<object><name>{name}</name>{flags}<bndbox>{box}</bndbox></object>"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three images in two splits; a cat only in val, so that train's categories must come from elsewhere."""
    root = tmp_path / "VOC"
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    objects = {
        "b": [voc_object("dog", 10, 20, 40, 60), voc_object("bird", 5, 5, 5, 9), voc_object("dog", -3, 10.5, 120, 90)],
        "a": [voc_object("bird", 1, 1, 11, 21, difficult=1, truncated=1)],
        "c": [voc_object("cat", 0, 0, 100, 80)],
    }
    for stem, found in objects.items():
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{''.join(found)}</annotation>")
        Image.new("RGB", (100, 80)).save(root / "JPEGImages" / f"{stem}.jpg")
    (root / "ImageSets" / "Main" / "train.txt").write_text("b  1\na -1\n\n")
    (root / "ImageSets" / "Main" / "val.txt").write_text("c\n")
    return root


def converted(root: Path, split: str | None = "train", one_based: bool = False, **options: object) -> tuple[dict, dict]:
    return voc_to_coco.to_coco(voc_to_coco.VocDataset(root, one_based), split, **options)


def test_images_stand_in_the_order_of_the_list_with_their_real_size(root: Path):
    coco, _ = converted(root)
    assert coco["images"] == [
        {"id": 1, "file_name": "b.jpg", "width": 100, "height": 80},
        {"id": 2, "file_name": "a.jpg", "width": 100, "height": 80},
    ]


def test_a_name_in_a_list_may_hold_spaces_and_end_in_a_number(root: Path):
    for stem in ("old car", "car 1"):
        for folder, suffix in (("Annotations", "xml"), ("JPEGImages", "jpg")):
            (root / folder / f"{stem}.{suffix}").write_bytes((root / folder / f"c.{suffix}").read_bytes())
    (root / "ImageSets" / "Main" / "train.txt").write_text("old car\ncar 1\nb  1\n")
    assert [image["file_name"] for image in converted(root)[0]["images"]] == ["old car.jpg", "car 1.jpg", "b.jpg"]
    (root / "ImageSets" / "Main" / "train.txt").write_text("old car -1\ncar 1  1\n")
    assert [image["file_name"] for image in converted(root)[0]["images"]] == ["old car.jpg", "car 1.jpg"]


def test_every_split_has_the_same_sorted_categories(root: Path):
    expected = [{"id": 1, "name": "bird"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert converted(root, "train")[0]["categories"] == converted(root, "val")[0]["categories"] == expected


def test_boxes_without_area_are_left_out_and_boxes_beyond_the_image_cut_and_both_counted(root: Path):
    coco, counts = converted(root)
    assert [box["bbox"] for box in coco["annotations"]] == [[10, 20, 30, 40], [0, 10.5, 100, 69.5], [1, 1, 10, 20]]
    assert [box["area"] for box in coco["annotations"]] == [1200, 6950, 200]
    assert [box["image_id"] for box in coco["annotations"]] == [1, 1, 2]
    assert counts == {"zero_area": 1, "cut": 1}


def test_a_box_wholly_outside_the_image_counts_as_one_without_area(root: Path):
    (root / "Annotations" / "c.xml").write_text(f"<annotation>{voc_object('cat', 110, 10, 130, 20)}</annotation>")
    coco, counts = converted(root, "val")
    assert coco["annotations"] == []
    assert len(coco["images"]) == 1
    assert counts["zero_area"] == 1


def test_difficult_objects_are_ignored_unless_kept_and_both_flags_stay(root: Path):
    ignored, kept = (converted(root, keep_difficult=keep)[0]["annotations"][-1] for keep in (False, True))
    assert (ignored["iscrowd"], ignored["difficult"], ignored["truncated"]) == (1, 1, 1)
    assert (kept["iscrowd"], kept["difficult"], kept["truncated"]) == (0, 1, 1)


def test_one_based_boxes_hold_their_last_pixel(root: Path):
    coco, _ = converted(root, one_based=True)
    assert coco["annotations"][0]["bbox"] == [9, 19, 31, 41]


def test_all_annotations_are_taken_where_no_split_is_named(root: Path):
    assert [image["file_name"] for image in converted(root, None)[0]["images"]] == ["a.jpg", "b.jpg", "c.jpg"]


def test_categories_stand_in_the_order_asked_for(root: Path):
    coco, _ = converted(root, classes=["dog", "cat", "bird"])
    assert [category["name"] for category in coco["categories"]] == ["dog", "cat", "bird"]
    assert [box["category_id"] for box in coco["annotations"]] == [1, 1, 3]


def test_an_image_that_lies_on_its_side_has_the_size_that_detectron2_sees(root: Path):
    from detectron2.data.detection_utils import read_image

    file = root / "JPEGImages" / "c.jpg"
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    Image.new("RGB", (100, 80)).save(file, exif=exif)
    image = converted(root, "val")[0]["images"][0]
    assert (image["height"], image["width"]) == read_image(str(file)).shape[:2] == (100, 80)


def spoil(root: Path, what: str) -> None:
    """One thing that is wrong in a tree."""
    annotations = root / "Annotations"
    if what == "xml":
        (annotations / "b.xml").write_text("<annotation>")
    elif what == "box":
        (annotations / "b.xml").write_text("<annotation><object><name>dog</name></object></annotation>")
    elif what == "number":
        (annotations / "b.xml").write_text(f"<annotation>{voc_object('dog', 1, 2, 3, 'x')}</annotation>")
    elif what == "nan":
        (annotations / "b.xml").write_text(f"<annotation>{voc_object('dog', 'nan', 2, 3, 4)}</annotation>")
    elif what == "encoding":
        (annotations / "b.xml").write_text('<?xml version="1.0" encoding="gb2312"?><annotation/>')
    elif what == "name":
        (annotations / "b.xml").write_text(f"<annotation>{voc_object('', 1, 2, 3, 4)}</annotation>")
    elif what == "annotation":
        (annotations / "b.xml").unlink()
    elif what == "image":
        (root / "JPEGImages" / "b.jpg").unlink()
    elif what == "pixels":
        (root / "JPEGImages" / "b.jpg").write_text("no image")
    elif what == "twice":
        (root / "ImageSets" / "Main" / "train.txt").write_text("b\na\nb\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("xml", r"b\.xml is not XML: "),
        ("box", r"b\.xml: object 'dog' has no box of four numbers, but \[None, "),
        ("number", r"b\.xml: object 'dog' has no box of four numbers, but .*'x'"),
        ("nan", r"b\.xml: object 'dog' has no box of four numbers, but .*'nan'"),
        ("encoding", r"b\.xml cannot be read: multi-byte encodings are not supported"),
        ("name", r"b\.xml: the object at .* has no name"),
        ("annotation", r"there is no annotation file .*b\.xml"),
        ("image", r"JPEGImages has no image b with a suffix among"),
        ("pixels", r"b\.jpg is not an image"),
        ("twice", r"train\.txt lists b 2 times"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(root: Path, what: str, message: str):
    spoil(root, what)
    with pytest.raises(UserError, match=message):
        converted(root)


def test_an_unknown_split_is_answered_with_those_there_are(root: Path):
    with pytest.raises(UserError, match=r"there is no list .*test\.txt; lists found: train, val"):
        converted(root, "test")


def test_a_class_that_was_not_named_is_refused(root: Path):
    with pytest.raises(UserError, match=r"b\.xml has class 'bird', but the classes are dog, cat"):
        converted(root, classes=["dog", "cat"])
    with pytest.raises(UserError, match="a class is named twice in dog dog"):
        converted(root, classes=["dog", "dog"])


def test_another_folder_is_not_taken_for_voc(tmp_path: Path):
    with pytest.raises(UserError, match="has no folder Annotations"):
        voc_to_coco.VocDataset(tmp_path)


def test_the_command_writes_a_file_that_the_printed_config_trains_on(root: Path, capsys: pytest.CaptureFixture):
    output = root / "new: [a, b] #1" / "train.json"  # yaml's own signs in a path
    voc_to_coco.main([str(root), "--split", "train", "--output", str(output)])
    printed = capsys.readouterr().out
    assert "2 images, 3 boxes, 3 categories (bird, cat, dog)" in printed
    assert "zero area: 1 boxes; cut at the image's edge: 1" in printed
    assert yaml.safe_load(printed[printed.index("DATASETS:") :]) == {
        "DATASETS": {"REGISTER": [["train", str(output), str(root / "JPEGImages")]], "TRAIN": ["train"]},
        "MODEL": {"ROI_HEADS": {"NUM_CLASSES": 3}},
    }
    assert json.loads(output.read_text()) == converted(root)[0]
    assert [path.name for path in output.parent.iterdir()] == ["train.json"]


def test_the_command_says_in_one_line_what_is_wrong(root: Path):
    with pytest.raises(SystemExit, match=r"^voc_to_coco: there is no list"):
        voc_to_coco.main([str(root), "--split", "test", "--output", str(root / "x.json")])
    assert not (root / "x.json").exists()


def test_real_blood_cells_convert_but_for_their_two_boxes_of_zero_area(shared_dir: Path, tmp_path: Path):
    root = shared_dir / "data" / "bccd" / "BCCD"
    if not root.is_dir():
        pytest.skip(f"no data set at {root}")
    boxes = 0
    for split, images in {"train": 205, "val": 87, "test": 72}.items():
        output = tmp_path / f"{split}.json"
        voc_to_coco.main([str(root), "--split", split, "--output", str(output)])
        coco = COCO(str(output))
        assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == ["Platelets", "RBC", "WBC"]
        assert len(coco.imgs) == images
        boxes += len(coco.anns)
    coco, counts = converted(root, None)
    assert boxes == len(coco["annotations"]) == 4886  # of 4888
    assert counts == {"zero_area": 2, "cut": 0}
