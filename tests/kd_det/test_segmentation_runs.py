"""A segmentor through the tools: trained by train_net, resumed, reported, drawn, exported, and refused by name."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from helpers.tiny_detector import TINY_PANOPTIC, TINY_SEGMENTOR
from kd_core.utils.errors import UserError
from kd_det.config import kd_defaults, merge_list
from kd_det.data import check_datasets, register_datasets
from kd_det.data.loader import build_train_loader
from kd_det.engine.trainer import DistillationTrainer
from kd_det.evaluation.evaluator import build_evaluator
from kd_det.evaluation.html_report import detector_page, read_detector_run
from kd_det.evaluation.visualize import draw_dataset, read_detectors, records_of
from kd_det.export import read_student, save_plain, save_torchscript

CLASSES = ["sky", "road", "car"]
TRAINING = (
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", 2,
    "SOLVER.BASE_LR", 0.005, "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "INPUT.CROP.ENABLED", True,
    "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "[48, 48]", "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3,
)  # fmt: skip
DEEPKD = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.AMP.ENABLED", True,
    "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.ACCUMULATE_STEPS", 2, "KD.PIXELS.SAMPLE", 50,
)  # fmt: skip


@pytest.fixture
def street(tmp_path) -> list[str]:
    """An entry of REGISTER_SEM_SEG: four images of 64 × 80 px with label maps, in a folder each."""
    draw = np.random.default_rng(0)
    for index in range(4):
        labels = np.repeat(np.repeat(draw.integers(3, size=(8, 10), dtype=np.uint8), 8, 0), 8, 1)
        labels[:4] = 255
        pixels = np.stack([labels % 3 * 80] * 3, 2) + draw.integers(40, size=(64, 80, 3))
        for folder, array, name in (("images", pixels, f"{index}.jpg"), ("labels", labels, f"{index}.png")):
            (tmp_path / folder / "town").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / folder / "town" / name)
    name = f"street_{tmp_path.name}"
    yield [name, str(tmp_path / "images"), str(tmp_path / "labels"), *CLASSES]
    if name in DatasetCatalog:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name)


def config(tmp_path: Path, entry: list[str], *overrides: object, tiny: dict = TINY_SEGMENTOR):
    cfg = kd_defaults()
    cfg.merge_from_list([word for pair in tiny.items() for word in pair])
    cfg.DATASETS.REGISTER_SEM_SEG, cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = [entry], (entry[0],), (entry[0],)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    merge_list(cfg, [str(word) for word in (*TRAINING, *overrides)])
    if not (tmp_path / "teacher.yaml").exists():
        (tmp_path / "teacher.yaml").write_text(cfg.dump())
    cfg.KD.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    return cfg


def train(cfg, resume: bool = False) -> DistillationTrainer:
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    register_datasets(cfg)
    torch.manual_seed(0)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_trained_with_streams_in_bfloat16_and_resumed_to_the_bit_then_reported_drawn_and_exported(street, tmp_path):
    cfg = config(tmp_path, street, *DEEPKD)
    whole = train(cfg)
    assert 0 <= whole._last_eval_results["sem_seg"]["mIoU"] <= 100
    lines = [json.loads(line) for line in (tmp_path / "output" / "metrics.json").read_text().splitlines()]
    assert {"loss_sem_seg", "loss_kd_tckd", "loss_kd_nckd", "sem_seg/mIoU"} <= set().union(*lines)

    # What is left of a training that was killed after its second iteration.
    output = tmp_path / "output"
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "model_0000001.pth").write_bytes((output / "model_0000001.pth").read_bytes())
    (tmp_path / "killed" / "last_checkpoint").write_text("model_0000001.pth")
    again = cfg.clone()
    again.OUTPUT_DIR = str(tmp_path / "killed")
    resumed = train(again, resume=True)
    assert resumed.start_iter == 2
    expected, found = (trainer.checkpointer.model.state_dict() for trainer in (whole, resumed))
    assert all(torch.equal(found[key], expected[key]) for key in expected)

    (output / "config.yaml").write_text(cfg.dump())
    run = read_detector_run(output)
    page = detector_page([run], "Streets").render()
    assert "mIoU" in page and "car" in page

    student = read_student(output)
    plain = get_cfg()
    plain.merge_from_file(str(output / "student.yaml"))  # plain detectron2 knows every key
    assert plain.MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    build_model(plain).load_state_dict(student.model.state_dict())
    (tmp_path / "exported").mkdir()
    save_plain(student, tmp_path / "exported")
    assert save_torchscript(student, tmp_path / "exported" / "student.ts") == ["sem_seg"]
    image = torch.randint(256, (3, 72, 88), dtype=torch.uint8)
    with torch.no_grad():
        logits = student.model([{"image": image, "height": 72, "width": 88}])[0]["sem_seg"]
        (traced,) = torch.jit.load(tmp_path / "exported" / "student.ts")(image)
        assert torch.allclose(traced, logits, atol=1e-4)

    records, metadata = records_of(cfg, street[0], 2)
    detectors = read_detectors(str(output), cfg)
    paths = draw_dataset(records, metadata, detectors, tmp_path / "pictures", 0.5)
    assert [detector.title for detector in detectors] == ["teacher", "student"] and len(paths) == 2
    with Image.open(paths[0]) as picture:
        assert picture.width > 4 * 80 and picture.height > 64


def spoil(entry: list[str], how: str) -> None:
    path = Path(entry[2], "town", "1.png")
    labels = np.asarray(Image.open(path)).copy()
    if how == "size":
        Image.fromarray(labels[:32]).save(path)
    elif how == "class":
        labels[50:] = 7
        Image.fromarray(labels).save(path)
    elif how == "palette":  # as PASCAL VOC's: index and colour differ
        image = Image.fromarray(labels)
        image.putpalette(bytes(range(255, -1, -1)) * 3)
        image.save(path)
    else:
        path.unlink()


def test_the_label_map_of_a_photograph_that_lies_on_its_side_is_upright(street, tmp_path):
    """detectron2 turns the image by its EXIF."""
    path = Path(street[1], "town", "1.jpg")
    with Image.open(path) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    cfg = config(tmp_path, street, "INPUT.CROP.ENABLED", False)
    register_datasets(cfg)
    record = DatasetCatalog.get(street[0])[1]
    assert (record["width"], record["height"]) == (80, 64)
    for _, _ in zip(range(4), build_train_loader(cfg), strict=False):
        pass


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("size", r"town/1\.png is 80 × 32 and its image 80 × 64: a label map has the image's size"),
        (
            "class",
            r"town/1\.png holds the class id 7: ids are 0 … 2 for the 3 classes \(MODEL.SEM_SEG_HEAD.NUM_CLASSES\)",
        ),
        ("palette", r"town/1\.png is a png with a palette, whose colours detectron2 reads in the place of"),
        ("gone", r"town/1\.jpg has no label map: there is no .*town/1\.png"),
    ],
)
def test_a_label_map_that_does_not_fit_is_named_in_training_and_in_evaluation(street, tmp_path, how, message):
    cfg = config(tmp_path, street, "INPUT.CROP.ENABLED", False)
    spoil(street, how)
    register_datasets(cfg)
    with pytest.raises(UserError, match=message):
        for _, _ in zip(range(4), build_train_loader(cfg), strict=False):
            pass
    if how == "class":
        evaluator = build_evaluator(cfg, street[0])
        evaluator.reset()
        record = DatasetCatalog.get(street[0])[1]
        with pytest.raises(UserError, match=message):
            evaluator.process([record], [{"sem_seg": torch.zeros(3, 64, 80)}])


def test_a_map_of_another_number_of_classes_and_data_without_maps_are_refused(street, tmp_path):
    cfg = config(tmp_path, street, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5)
    register_datasets(cfg)
    with pytest.raises(UserError, match=r"has 3 classes: MODEL.SEM_SEG_HEAD.NUM_CLASSES 5 does not fit, set it to 3"):
        check_datasets(cfg)
    cfg.DATASETS.TRAIN = ("digits_train",)
    with pytest.raises(UserError, match=r"DATASETS.TRAIN: digits_train has no label maps, from which"):
        check_datasets(cfg)
    cfg.DATASETS.REGISTER_SEM_SEG = [street[:4]]
    with pytest.raises(UserError, match="of at least two classes, but one entry is"):
        register_datasets(cfg)


@contextmanager
def few_panoptic(name: str, path: Path) -> Iterator[str]:
    """The first four images of a panoptic data set, as one of its own; its truth is written to `path`."""
    records, metadata = DatasetCatalog.get(name)[:4], MetadataCatalog.get(name).as_dict()
    truth = json.loads(Path(metadata.pop("json_file")).read_text())
    numbers = {record["image_id"] for record in records}
    truth["images"] = [image for image in truth["images"] if image["id"] in numbers]
    truth["annotations"] = [one for one in truth["annotations"] if one["image_id"] in numbers]
    path.write_text(json.dumps(truth))
    DatasetCatalog.register("few_panoptic", lambda: records)
    MetadataCatalog.get("few_panoptic").set(**{**metadata, "name": "few_panoptic", "json_file": str(path)})
    try:
        yield "few_panoptic"
    finally:
        DatasetCatalog.remove("few_panoptic")
        MetadataCatalog.pop("few_panoptic")


def test_a_panoptic_model_trains_on_the_digits_and_things_without_masks_are_refused(tmp_path):
    name = "digits_panoptic_val"
    overrides = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, "INPUT.CROP.ENABLED", False, "INPUT.MASK_FORMAT", "bitmask")
    loss = ("KD.LOSS.NAME", "dkd", "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", "()")
    cfg = config(tmp_path, [name, "images", "labels", "things", "photo"], *overrides, *loss, tiny=TINY_PANOPTIC)
    cfg.DATASETS.REGISTER_SEM_SEG, cfg.DATASETS.TEST = [], ()
    check_datasets(cfg)
    trainer = train(cfg)
    lines = (tmp_path / "output" / "metrics.json").read_text()
    assert re.search("loss_mask.*", lines) and "loss_kd_tckd_pixels" in lines and "loss_kd_nckd" in lines
    assert (
        trainer.checkpointer.model.state_dict().keys()
        == build_model(read_student(tmp_path / "output").config).state_dict().keys()
    )
    with few_panoptic(name, tmp_path / "few.json") as few:
        cfg.DATASETS.TEST = (few,)
        results = DistillationTrainer.test(cfg, trainer.checkpointer.model)
    assert set(results) == {"bbox", "segm", "sem_seg"}  # and PQ where panopticapi is installed, which no index has
    assert 0 < results["sem_seg"]["mIoU"] <= 100 and "IoU-photo" in results["sem_seg"] and results["segm"]["AP"] >= 0
    with pytest.raises(UserError, match="not implemented for PanopticFPN"):
        save_torchscript(read_student(tmp_path / "output"), tmp_path / "student.ts")

    def without_masks():
        records = DatasetCatalog.get(name)
        records[0]["annotations"][0].pop("segmentation")
        return records

    DatasetCatalog.register("maskless", without_masks)
    try:
        cfg.DATASETS.TRAIN = ("maskless",)
        MetadataCatalog.get("maskless").set(thing_classes=MetadataCatalog.get(name).thing_classes)
        with pytest.raises(UserError, match=r"000000\.jpg has things without masks, from which DistilledPanopticFPN"):
            build_train_loader(cfg)
    finally:
        DatasetCatalog.remove("maskless")
        MetadataCatalog.pop("maskless")
