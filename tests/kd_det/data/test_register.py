"""DATASETS.REGISTER, and what is found out about data sets before training."""

import json
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from kd_core.utils.errors import UserError
from kd_det import add_kd_config
from kd_det.data import check_datasets, register_datasets


@pytest.fixture(autouse=True)
def clean_catalog() -> None:
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """$DETECTRON2_DATASETS with one data set of two classes and one image in it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "one.jpg")
    write_coco(tmp_path / "pets.json", ["cat", "dog"])
    return tmp_path


def write_coco(path: Path, classes: list[str]) -> None:
    box = {"id": 1, "image_id": 1, "category_id": 2, "bbox": [5, 5, 20, 10], "area": 200, "iscrowd": 0}
    image = {"id": 1, "file_name": "one.jpg", "width": 60, "height": 40}
    categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
    content = {"info": {}, "images": [image], "annotations": [box], "categories": categories[::-1]}
    path.write_text(json.dumps(content))


def config(*register: list[str], train: tuple = (), test: tuple = (), num_classes: int = 2) -> CfgNode:
    cfg = get_cfg()
    add_kd_config(cfg)
    cfg.DATASETS.REGISTER = list(register)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes
    return cfg


PETS = ["pets_train", "pets.json", "images"]


def test_a_data_set_of_ones_own_comes_from_a_yaml_file_alone(root: Path):
    cfg = config()
    yaml = root / "config.yaml"
    yaml.write_text("""
DATASETS:
  REGISTER:
  - [pets_train, pets.json, images]
  - [pets_test, pets.json, images]
  TRAIN: [pets_train]
  TEST: [pets_test]
""")
    cfg.merge_from_file(str(yaml), allow_unsafe=False)
    register_datasets(cfg)
    check_datasets(cfg)
    (record,) = DatasetCatalog.get("pets_train")
    assert record["file_name"] == str(root / "images" / "one.jpg")
    assert record["annotations"][0]["category_id"] == 1
    metadata = MetadataCatalog.get("pets_train")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.evaluator_type == "coco"


def test_a_data_set_of_ones_own_comes_from_the_command_line(root: Path):
    cfg = config(train=("pets_train",))
    cfg.merge_from_list(["DATASETS.REGISTER", "[['pets_train','pets.json','images']]"])
    register_datasets(cfg)
    check_datasets(cfg)


def test_absolute_paths_and_the_home_folder_stay_what_they_are(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(root))
    monkeypatch.setenv("DETECTRON2_DATASETS", "/nowhere")
    register_datasets(config(["pets_train", str(root / "pets.json"), "~/images"]))
    assert len(DatasetCatalog.get("pets_train")) == 1


def test_registering_twice_does_no_harm(root: Path):
    register_datasets(config(PETS))
    register_datasets(config(PETS))
    assert len(DatasetCatalog.get("pets_train")) == 1
    register_datasets(config(PETS))


@pytest.mark.parametrize("taken", ["pets_train", "coco_2017_val", "digits_train"])
def test_a_name_that_is_taken_is_refused_for_other_paths(root: Path, taken: str):
    register_datasets(config(PETS))
    with pytest.raises(UserError, match=rf"DATASETS\.REGISTER: {taken} is already a data set .*other\.json"):
        register_datasets(config([taken, "other.json", "images"]))


@pytest.mark.parametrize("entry", ["pets,pets.json,images", ["pets", "pets.json"], ["pets", "a", 3], ["", "a", "b"]])
def test_an_entry_of_another_form_is_refused(entry: object):
    with pytest.raises(UserError, match=r"is a list of \[name, json file, image folder\], but one entry is") as info:
        register_datasets(config(entry))
    assert "DATASETS.REGISTER" in str(info.value) and repr(entry) in str(info.value)


@pytest.mark.parametrize(("field", "gone"), [("json_file", "pets.json"), ("image_root", "images")])
def test_a_missing_file_or_folder_is_named_with_the_root(root: Path, field: str, gone: str):
    cfg = config(PETS, test=("pets_train",))
    register_datasets(cfg)
    (root / gone).rename(root / "moved")
    with pytest.raises(UserError, match=rf"its {field} {root}/{gone} does not exist") as info:
        check_datasets(cfg)
    assert str(info.value).startswith("DATASETS.TEST: pets_train is not on disk")
    assert f"DETECTRON2_DATASETS, where relative paths start, is {root}" in str(info.value)


def test_a_data_set_of_detectron2_that_is_not_on_disk_is_named_too(root: Path):
    with pytest.raises(UserError, match=r"coco_2017_train .*instances_train2017\.json .*DETECTRON2_DATASETS"):
        check_datasets(config(train=("coco_2017_train",), num_classes=80))


def test_an_unknown_name_is_answered_with_the_near_ones(root: Path):
    register_datasets(config(PETS))
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN: .* called 'pets_trian'; did you mean pets_train"):
        check_datasets(config(train=("pets_trian",)))
    with pytest.raises(UserError, match=r"'zzz'; no registered name is similar\. DATASETS\.REGISTER is a list of"):
        check_datasets(config(test=("zzz",)))


def test_the_number_of_classes_must_be_the_models(root: Path):
    cfg = config(PETS, train=("pets_train",), num_classes=80)
    register_datasets(cfg)
    with pytest.raises(UserError, match=r"pets_train has 2 classes: .*NUM_CLASSES 80 does not fit, set it to 2$"):
        check_datasets(cfg)
    with pytest.raises(UserError, match=r"digits_val has 10 classes: MODEL\.ROI_HEADS\.NUM_CLASSES 80 does not fit"):
        check_datasets(config(test=("digits_val",), num_classes=80))


def test_two_data_sets_must_have_the_same_classes_in_the_same_order(root: Path):
    write_coco(root / "other.json", ["dog", "cat"])
    cfg = config(PETS, ["pets_test", "other.json", "images"], train=("pets_train",), test=("pets_test",))
    register_datasets(cfg)
    with pytest.raises(UserError, match=r"DATASETS\.TEST: pets_test has not the classes of pets_train in their order"):
        check_datasets(cfg)


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"categories": [{"id": 1}]}'])
def test_a_file_that_is_no_coco_annotation_is_named(root: Path, content: str):
    cfg = config(PETS, train=("pets_train",))
    register_datasets(cfg)
    (root / "pets.json").write_text(content)
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN: pets_train: .*pets\.json is no"):
        check_datasets(cfg)


@pytest.mark.parametrize("annotations", [[], None])
def test_the_images_of_a_test_need_no_annotations(root: Path, annotations: list | None):
    content = json.loads((root / "pets.json").read_text()) | {"annotations": annotations}
    if annotations is None:
        del content["annotations"]
    (root / "pets.json").write_text(json.dumps(content))
    cfg = config(PETS, train=("pets_train",), test=("pets_train",))
    register_datasets(cfg)
    check_datasets(cfg, keys=["TEST"])
    with pytest.raises(UserError, match=r"DATASETS\.TRAIN: pets_train: .*annotations"):
        check_datasets(cfg)


def test_only_the_keys_asked_for_are_looked_at(root: Path):
    check_datasets(config(train=("zzz",), test=("digits_val",), num_classes=10), keys=["TEST"])


def test_the_built_in_data_set_is_there_before_it_is_written(root: Path):
    check_datasets(config(train=("digits_train",), test=("digits_val",), num_classes=10))
    assert not (root / "digits").exists()


def test_real_coco_annotations_with_relative_paths(shared_dir: Path, monkeypatch: pytest.MonkeyPatch):
    root = shared_dir / "data" / "coco-mini"
    if not root.is_dir():
        pytest.skip(f"no data set at {root}")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
    cfg = config(["mini_val", "annotations/instances_val2017.json", "val2017"], test=("mini_val",), num_classes=80)
    register_datasets(cfg)
    check_datasets(cfg)
    assert len(DatasetCatalog.get("mini_val")) == 47
