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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.json", "images"], "missing.json: there is no such file"),
        (["one.json"], "expected a config, a folder of classes, or JSON IMAGES pairs"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(check_data, words, message):
    with pytest.raises(SystemExit, match=message):
        check_data.main(words)
