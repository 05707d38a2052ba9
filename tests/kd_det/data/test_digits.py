"""The built-in data set: what is on the images, what is in the files, and that it is written once and whole."""

import hashlib
import json
import multiprocessing
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from helpers import ROOT
from kd_core.utils.errors import UserError
from kd_det.data import builtin, digit_maps, digits, prepare_digits, register_digits

TINY = (replace(digits.TRAIN, name="tiny_train", num_images=6), replace(digits.VAL, name="tiny_val", num_images=4))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> tuple[digits.Split, ...]:
    """The same generator, asked for ten images."""
    monkeypatch.setattr(digits, "SPLITS", TINY)
    return TINY


@pytest.fixture
def registered(tiny: tuple[digits.Split, ...], tmp_path: Path) -> Path:
    register_digits(tmp_path)
    yield tmp_path
    for split in tiny:
        DatasetCatalog.remove(split.name)
        MetadataCatalog.pop(split.name)


def contents(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class RecordedSamples:
    """The samples of a split, and which of them were drawn."""

    def __init__(self, samples: np.ndarray) -> None:
        self.samples, self.drawn = samples, set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> np.ndarray:
        self.drawn.add(int(index))
        return self.samples[index]


# SHA-256 over the boxes of every image with seed 0, and over pixels and boxes of every tenth, from before there was a
# test split; and over the digits of that split: those which no image of the other two shows.
EARLIER_BOXES = {
    "digits_train": "28d06518d047410424407e6564daa561a97b5609c0f9f059e78f982185ed8af5",
    "digits_val": "297c2c33df8830625ddd8e8967805ddfb223590644b94a8ee22baf0170d19979",
}
EARLIER_IMAGES = {
    "digits_train": "067d1a3e109648b3430c473318b8891bcb060762c311dd39581ffbe67451f3cd",
    "digits_val": "35fe78a6e302d9ffed126aa3fe32f9a871cb530dab7e3e12a98c0c7ede27b341",
}
SHOWN_BY_NONE = "58cd83fde4aee2d6f7ae036ef2bf6e8365fb006db2291c1619bc19eb8ec43732"
# SHA-256 over the files of their first 20 images, and the json of those.
EARLIER_FILES = {
    "digits_train": "24c236c0cb7a4e9b60880bec32a411d0b87f4c5ffcc0b97b7c64b65efcfd17b4",
    "digits_val": "690474f84a300cda1cac344eaef999b21ca9ebdefc4b993b962c86f238cd1beb",
}


def test_train_and_val_are_as_before_the_test_split_and_show_no_digit_of_it(monkeypatch: pytest.MonkeyPatch):
    load, shown = digits.load_samples, set()
    for split in (digits.TRAIN, digits.VAL):
        samples, labels = load(split)
        recorded, digest = RecordedSamples(samples), hashlib.sha256()
        monkeypatch.setattr(digits, "load_samples", lambda _, found=(recorded, labels): found)
        for index in range(0, split.num_images, 10):
            image, boxes = digits.render(split, index, seed=0)
            digest.update(image.tobytes() + repr(boxes).encode())
        assert digest.hexdigest() == EARLIER_IMAGES[split.name]
        shown |= {split.digits[index] for index in recorded.drawn}
    assert not shown & set(digits.TEST.digits)
    assert hashlib.sha256(repr(digits.TEST.digits).encode()).hexdigest() == SHOWN_BY_NONE


def test_every_box_is_as_before_the_test_split_and_so_is_every_digit_that_was_drawn():
    folder = prepare_digits(ROOT / "datasets")  # which all tests share
    assert json.loads((folder / builtin.MARKER).read_text())["seed"] == 0, "written with another --seed: remove it"
    for name, expected in EARLIER_BOXES.items():
        content = json.loads((folder / "annotations" / f"{name}.json").read_text())
        boxes = [[found["image_id"], found["category_id"], *found["bbox"]] for found in content["annotations"]]
        assert hashlib.sha256(json.dumps(boxes).encode()).hexdigest() == expected


def test_the_files_of_train_and_val_are_as_before_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = tuple(replace(split, num_images=20) for split in digits.SPLITS)
    monkeypatch.setattr(digits, "SPLITS", first)
    folder = prepare_digits(tmp_path, seed=0)
    for name, expected in EARLIER_FILES.items():
        files = [*sorted((folder / name).glob("*.jpg")), folder / "annotations" / f"{name}.json"]
        assert hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() == expected
    assert len(json.loads((folder / "annotations" / "digits_test.json").read_text())["images"]) == 20


def test_no_photograph_is_in_two_splits_and_no_digit_in_train_and_val():
    train, val = ({ink.tobytes() for ink in digits.load_samples(split)[0]} for split in (digits.TRAIN, digits.VAL))
    assert len(train) + len(val) == 1797
    assert not train & val
    photos = [photo for split in digits.SPLITS for photo in digits.load_photos(split)]
    assert len({photo.tobytes() for photo in photos}) == len(photos)


def test_every_split_has_every_class():
    for split in digits.SPLITS:
        assert set(digits.load_samples(split)[1]) == set(range(10))


def test_all_splits_are_registered_on_import():
    assert {split.name for split in digits.SPLITS} == {"digits_train", "digits_val", "digits_test"}
    assert all(split.name in DatasetCatalog for split in digits.SPLITS)


@pytest.mark.parametrize("split", digits.SPLITS, ids=lambda split: split.name)
def test_boxes_lie_in_the_image_and_hide_little_of_each_other(split: digits.Split):
    for index in range(20):
        image, boxes = digits.render(split, index, seed=0)
        assert image.size == (digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        assert 1 <= len(boxes) <= digits.NUM_DIGITS[1]
        for box in boxes:
            assert 0 <= box.x < box.x + box.width <= digits.IMAGE_SIZE
            assert 0 <= box.y < box.y + box.height <= digits.IMAGE_SIZE
        assert all(a.covered_by(b) <= digits.MAX_COVERED for a, b in combinations(boxes, 2))


def test_digits_change_the_image_inside_their_boxes_only_and_up_to_each_edge(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digits, "MAX_NOISE", 0.0)
    monkeypatch.setattr(digits, "NUM_DIGITS", (3, 3))
    image, boxes = digits.render(digits.TRAIN, 5, seed=0)
    monkeypatch.setattr(digits, "NUM_DIGITS", (0, 0))
    empty, _ = digits.render(digits.TRAIN, 5, seed=0)

    changed = (np.asarray(image) != np.asarray(empty)).any(axis=2)
    for box in boxes:
        inside = changed[box.y : box.y + box.height, box.x : box.x + box.width]
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
    for box in boxes:
        changed[box.y : box.y + box.height, box.x : box.x + box.width] = False
    assert not changed.any()


def test_share_covered_is_of_the_smaller_box():
    small, large = digits.Box(1, 0, 0, 10, 10), digits.Box(2, 5, 0, 100, 100)
    assert small.covered_by(large) == large.covered_by(small) == 0.5
    assert small.covered_by(digits.Box(3, 10, 0, 10, 10)) == 0


def test_clutter_keeps_the_ink_of_its_digit_and_is_another_picture():
    sample = digits.load_samples(digits.VAL)[0][0]
    shuffled = digits._shuffled(sample, np.random.default_rng(0))
    assert sorted(shuffled.ravel()) == sorted(sample.ravel())
    assert (shuffled != sample).any()


def test_label_maps_show_each_digit_within_its_box_and_agree_with_each_other(tiny, tmp_path: Path):
    folder = prepare_digits(tmp_path, seed=3)
    truth = json.loads((folder / "annotations" / "tiny_val.json").read_text())
    segments = json.loads((folder / "annotations" / "panoptic_tiny_val.json").read_text())["annotations"]
    for image, parts in zip(truth["images"], segments, strict=True):
        boxes = [one for one in truth["annotations"] if one["image_id"] == image["id"]]
        kinds = ("sem_seg", "panoptic_sem_seg", "panoptic")
        paths = [folder / kind / "tiny_val" / parts["file_name"] for kind in kinds]
        classes, stuff, ids = (np.asarray(Image.open(path)) for path in paths)
        assert {part["id"] for part in parts["segments_info"]} == set(np.unique(ids[..., 0])) and not ids[..., 1:].any()
        assert np.array_equal(stuff == 0, ids[..., 0] != digit_maps.PHOTO_ID)
        assert np.array_equal(classes[stuff == 1] == digit_maps.PHOTO, classes[stuff == 1] != digit_maps.IGNORED)
        for number, box in enumerate(boxes, start=1):
            own = ids[..., 0] == number
            left, top, width, height = box["bbox"]
            rows, columns = np.nonzero(own)
            assert top <= rows.min() and rows.max() < top + height and left <= columns.min()
            assert columns.max() < left + width and (classes[own] == digit_maps.IGNORED).mean() < 0.7
            assert set(np.unique(classes[own])) - {digit_maps.IGNORED} == {box["category_id"] - 1}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny, tmp_path: Path):
    first, again = (contents(prepare_digits(tmp_path / name, seed=3)) for name in ("first", "again"))
    other = contents(prepare_digits(tmp_path / "other", seed=4))
    assert first == again
    assert first.keys() == other.keys()
    assert all(first[name] != other[name] for name in first)


def test_a_present_data_set_of_whatever_seed_is_left_alone(tiny, tmp_path: Path):
    image = prepare_digits(tmp_path, seed=7) / "tiny_val" / "000000.jpg"
    written = image.stat().st_mtime_ns
    assert prepare_digits(tmp_path) == prepare_digits(tmp_path, seed=7) == tmp_path / "digits"
    assert image.stat().st_mtime_ns == written


def test_a_data_set_of_another_generator_is_written_again_with_its_seed(tiny, tmp_path: Path):
    folder = prepare_digits(tmp_path, seed=7)
    expected = contents(folder)
    (folder / builtin.MARKER).write_text(json.dumps({"seed": 7, "source_sha256": "of last year"}))
    (folder / "tiny_val" / "leftover.jpg").touch()
    prepare_digits(tmp_path)
    assert contents(folder) == expected
    (folder / builtin.MARKER).write_text("cut o")
    prepare_digits(tmp_path, seed=7)
    assert contents(folder) == expected
    assert {path.name for path in tmp_path.iterdir()} <= {"digits", "digits.lock"}


def test_a_failure_leaves_nothing_behind(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(digits, "SPLITS", (replace(TINY[0], photos=("no_such_photo.png",)),))
    with pytest.raises(FileNotFoundError, match=r"no_such_photo\.png is missing: .* scikit-image"):
        prepare_digits(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"digits.lock"}


def test_a_folder_that_is_not_ours_is_never_replaced(tiny, tmp_path: Path):
    mine = tmp_path / "digits" / "my_own.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    with pytest.raises(UserError, match="was not written by kd_det"):
        prepare_digits(tmp_path)
    assert mine.read_text() == "precious"


def test_a_negative_seed_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="seed of the digits data set is -1"):
        prepare_digits(tmp_path, seed=-1)


def test_of_several_processes_one_writes_and_all_find_it_whole(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    replace_folder, writers = builtin._replace, tmp_path / "writers"

    def recorded(folder: Path, seed: int | None) -> None:
        with writers.open("a") as file:
            file.write("one\n")
        replace_folder(folder, seed)

    monkeypatch.setattr(builtin, "_replace", recorded)
    with multiprocessing.get_context("fork").Pool(4) as pool:  # forked, the processes know TINY
        folders = pool.map(prepare_digits, [tmp_path] * 4, chunksize=1)
    assert writers.read_text() == "one\n"
    assert set(folders) == {tmp_path / "digits"}
    assert len(list(folders[0].rglob("*.jpg"))) == 10


def test_detectron2_loads_it_and_finds_the_classes_in_order(registered: Path):
    assert not (registered / "digits").exists()  # nothing is written before it is asked for
    for split in TINY:
        dicts = DatasetCatalog.get(split.name)
        metadata = MetadataCatalog.get(split.name)
        assert metadata.thing_classes == list("0123456789")
        assert metadata.evaluator_type == "coco"
        assert len(dicts) == split.num_images
        for index, record in enumerate(dicts):
            _, boxes = digits.render(split, index, seed=0)
            assert Image.open(record["file_name"]).size == (record["width"], record["height"])
            found = [(a["category_id"], *a["bbox"]) for a in record["annotations"]]
            assert found == [(box.label, box.x, box.y, box.width, box.height) for box in boxes]


def test_a_detector_that_knows_the_truth_has_an_ap_of_100(registered: Path):
    dicts = DatasetCatalog.get("tiny_val")
    evaluator = COCOEvaluator("tiny_val", ("bbox",), distributed=False, use_fast_impl=False)
    evaluator.reset()
    for record in dicts:
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        instances = Instances((192, 192), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)), pred_classes=classes)
        evaluator.process([record], [{"instances": instances}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_registering_twice_does_no_harm(registered: Path):
    register_digits(registered)
    register_digits(registered / "elsewhere")
    assert MetadataCatalog.get("tiny_val").image_root == str(registered / "digits" / "tiny_val")


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        builtin.main(["--root", str(tmp_path), "--seed", "-2"])
    assert "it must be 0 or more" in capsys.readouterr().err


def test_the_command_writes_and_prints_the_folder(tiny, tmp_path: Path, capsys: pytest.CaptureFixture):
    builtin.main(["--root", str(tmp_path)])
    assert capsys.readouterr().out.strip() == str(tmp_path / "digits")
    assert (tmp_path / "digits" / "annotations" / "tiny_train.json").is_file()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written to .*file/digits .*: set DETECTRON2_DATASETS"):
        prepare_digits(tmp_path / "file")
