"""tools/check_data.py: exit status, what it prints, and the cleaned json."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def check_data(load_tool):
    return load_tool("check_data")


def write_split(root: Path, name: str, shades: list[int]) -> list[str]:
    """A COCO json of one category and its images; returns [json file, image folder]."""
    folder = root / name
    folder.mkdir()
    for index, shade in enumerate(shades):
        Image.new("RGB", (20, 20), (shade, shade, shade)).save(folder / f"{index}.png")
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 20} for i in range(len(shades))],
        "annotations": [{"id": i, "image_id": i, "category_id": 1, "bbox": [1, 1, 5, 5]} for i in range(len(shades))],
        "categories": [{"id": 1, "name": "cell"}],
    }
    (root / f"{name}.json").write_text(json.dumps(data))
    return [str(root / f"{name}.json"), str(folder)]


def write_classes(root: Path, shade: int = 0) -> Path:
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for index in range(2):
                shade += 1
                Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(folder / f"{index}.png")
    return root


def test_sound_splits_exit_with_0(check_data, tmp_path, capsys):
    words = write_split(tmp_path, "train", [0, 10]) + write_split(tmp_path, "val", [20])
    assert check_data.main(words) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing is wrong"


def test_a_leak_between_splits_exits_with_1(check_data, tmp_path, capsys):
    words = write_split(tmp_path, "train", [0, 10]) + write_split(tmp_path, "val", [10])
    assert check_data.main(words) == 1
    assert "the same image in two splits (1): 1.png of" in capsys.readouterr().out


def test_output_is_a_json_in_which_nothing_is_wrong(check_data, tmp_path, capsys):
    words = write_split(tmp_path, "train", [0, 10, 20])
    (tmp_path / "train" / "1.png").write_bytes(b"no image")
    cleaned = str(tmp_path / "cleaned.json")
    assert check_data.main([*words, "--output", cleaned]) == 1
    assert "1.png" in capsys.readouterr().out
    assert check_data.main([cleaned, words[1]]) == 0


def test_the_built_in_data_of_a_config_are_sound(check_data, capsys):
    assert check_data.main(["configs/Digits/dkd.yaml"]) == 0
    out = capsys.readouterr().out
    assert "1000 images" in out and "200 images" in out


def test_a_folder_of_classes_is_looked_at_file_by_file(check_data, tmp_path, capsys):
    root = write_classes(tmp_path / "mine")
    assert check_data.main([str(root)]) == 0
    broken = root / "train" / "cat" / "0.png"
    broken.write_bytes(broken.read_bytes()[:30])
    (root / "val" / "dog" / "1.png").write_bytes((root / "train" / "dog" / "0.png").read_bytes())
    assert check_data.main([str(root)]) == 1
    out = capsys.readouterr().out
    assert f"image that cannot be decoded (1): {broken}" in out and "the same image in two splits (1)" in out


def test_the_data_of_a_classifiers_config_are_looked_at(check_data, tmp_path, capsys):
    root = write_classes(tmp_path / "mine")
    config = tmp_path / "mine.yaml"
    config.write_text(f"DATA: {{NAME: folder, ROOT: {root}}}\n")
    assert check_data.main([str(config)]) == 0
    (root / "train" / "cat" / "0.png").write_bytes(b"no image")
    assert check_data.main([str(config)]) == 1
    assert "train image that cannot be decoded (1)" in capsys.readouterr().out
    assert check_data.main(["configs/Digits/cls_dkd.yaml"]) == 0
    assert "digits: 1198 training and 599 validation images of 10 classes" in capsys.readouterr().out


def write_label_maps(root: Path, split: str, shades: list[int]) -> list[str]:
    """Images with label maps of two classes; returns the entry of DATASETS.REGISTER_SEM_SEG."""
    images, labels = root / "images" / split, root / "labels" / split
    for folder, mode in ((images, "RGB"), (labels, "L")):
        folder.mkdir(parents=True)
        for index, shade in enumerate(shades):
            Image.new(mode, (20, 10), (shade,) * 3 if mode == "RGB" else index % 2).save(folder / f"{index}.png")
    return [f"{root.name}_{split}", str(images), str(labels), "road", "sky"]


def test_the_label_maps_of_a_config_are_looked_at_one_by_one(check_data, tmp_path, capsys):
    entries = [write_label_maps(tmp_path, "train", [0, 1, 2, 3, 4]), write_label_maps(tmp_path, "val", [50, 51])]
    words = ["configs/CamVid/kd.yaml", "DATASETS.REGISTER_SEM_SEG", str(entries), "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "2"]
    words += ["DATASETS.TRAIN", str((entries[0][0],)), "DATASETS.TEST", str((entries[1][0],))]
    assert check_data.main(words) == 0
    assert "5 images with label maps" in capsys.readouterr().out
    images, labels = tmp_path / "images" / "train", tmp_path / "labels" / "train"
    (images / "0.png").write_bytes(b"no image")
    (labels / "1.png").unlink()
    Image.new("L", (20, 10), 7).save(labels / "2.png")
    Image.new("L", (20, 11), 1).save(labels / "3.png")
    (tmp_path / "images" / "val" / "0.png").write_bytes((images / "4.png").read_bytes())
    assert check_data.main(words) == 1
    out = capsys.readouterr().out
    for line in (
        f"image that cannot be decoded (1): {images / '0.png'}",
        f"image without a label map (1): {images / '1.png'} (there is no {labels / '1.png'})",
        f"label map that is wrong (1): {labels / '2.png'} holds the class id 7",
        f"label map of another size than its image (1): {labels / '3.png'} (20 × 11, the image 20 × 10)",
        "the same image in two splits (1): 4.png",
        "5 problems",
    ):
        assert line in out


def test_label_maps_that_are_not_there_are_not_sound(check_data):
    with pytest.raises(SystemExit, match=r"camvid_train is not on disk: its image_root .* does not exist"):
        check_data.main(["configs/CamVid/kd.yaml"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.json", "images"], "missing.json: there is no such file"),
        (["one.json"], "expected a config, a folder of classes, or JSON IMAGES pairs"),
        (["tests", "--output", "cleaned.json"], "--output writes a COCO json, and tests is a data set of classes"),
        (["one.json", "images", "--output", "no/cleaned.json"], "--output no/cleaned.json: there is no folder no"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(check_data, words, message):
    with pytest.raises(SystemExit, match=message):
        check_data.main(words)
