"""One small training of any detection config: built, stepped and saved; resumed, stepped again and evaluated.

What is scaled down is size alone: images, widths, numbers of proposals and iterations. Architecture, depth, losses,
optimizer and preprocessing are the config's own, the teacher's those of its own yaml; both start from random weights.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import yacs.config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils.env import seed_all_rng

from kd_core.losses.feature_config import distils
from kd_core.utils.config import changes_as_yaml
from kd_det.checks import data_checks
from kd_det.config import all_keys, kd_defaults, merge_file, merge_list
from kd_det.data import prepare_digits
from kd_det.engine.trainer import DistillationTrainer
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys
from kd_det.modeling.teacher.lazy import config_path

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"train": 6, "val": 1}

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,  # a group norm has 32 groups
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 64,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 64,
}
STUDENT = {
    "MODEL.BACKBONE.FREEZE_AT": 0,  # its weights are random
    "MODEL.TIMM.PRETRAINED": False,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.0001,  # of frozen statistics over random weights
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": [1],
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "KD.TEACHER.WEIGHTS": "",
    "KD.TEACHER.ALLOW_RANDOM": True,
    "SEED": 1,
}
NARROW = {"MODEL.RESNETS.WIDTH_PER_GROUP": 4, "MODEL.RESNETS.RES2_OUT_CHANNELS": 8}  # bottlenecks only: depth ≥ 50


def shrink(cfg: CfgNode, *overrides: dict) -> CfgNode:
    """`cfg` with the sizes of SMALL."""
    narrow = NARROW if cfg.MODEL.RESNETS.DEPTH >= 50 else {}
    dense = cfg.MODEL.META_ARCHITECTURE in ("DistilledRetinaNet", "RetinaNet")
    levels = cfg.MODEL.RETINANET.IN_FEATURES if dense else range(5)
    anchors = {"MODEL.ANCHOR_GENERATOR.SIZES": [[8 * 2**level] for level in range(len(levels))]}
    deeplab = {"MODEL.SEM_SEG_HEAD.ASPP_CHANNELS": 32} if "ASPP_CHANNELS" in cfg.MODEL.SEM_SEG_HEAD else {}
    crop = {"INPUT.CROP.SIZE": [32, 64]} if cfg.INPUT.CROP.TYPE == "absolute" else {}
    merged = {key: value for part in (SMALL, anchors, narrow, deeplab, crop, *overrides) for key, value in part.items()}
    merge_list(cfg, [str(word) for pair in merged.items() for word in pair])
    return cfg


def read(path: str | Path) -> CfgNode:
    """The config in a yaml file."""
    cfg = kd_defaults()
    merge_file(cfg, str(path))
    return cfg


def make_data(folder: Path, num_classes: int) -> list[list[str]]:
    """Some of the built-in digits as COCO-format data sets of `num_classes`, with outlines; entries for REGISTER."""
    digits = prepare_digits(ROOT / "datasets")
    categories = [{"id": i, "name": str(i - 1) if i <= 10 else f"other {i}"} for i in range(1, num_classes + 1)]
    entries = []
    for split, count in IMAGES.items():
        content = json.loads((digits / "annotations" / f"digits_{split}.json").read_text())
        content["categories"], content["images"] = categories, content["images"][:count]
        kept = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
        for annotation in content["annotations"]:
            x, y, w, h = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        name = f"walk_{split}_{num_classes}"
        path = folder / f"{name}.json"
        path.write_text(json.dumps(content))
        entries.append([name, str(path), str(digits / f"digits_{split}")])
    return entries


def label_map_data(cfg: CfgNode, folder: Path) -> dict[str, object]:
    """Overrides for a segmentation: a few of the digits' label maps, as data sets of the model's number of classes."""
    digits, classes = prepare_digits(ROOT / "datasets"), [f"c{k}" for k in range(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES)]
    entries = []
    for split, count in IMAGES.items():
        name = f"walk_maps_{split}_{len(classes)}"
        kinds = {f"digits_{split}": ".jpg", f"sem_seg/digits_{split}": ".png"}
        entry = [name]
        for source, suffix in kinds.items():
            target = folder / name / suffix[1:]
            target.mkdir(parents=True, exist_ok=True)
            entry.append(str(target))
            for path in sorted((digits / source).glob(f"*{suffix}"))[:count]:
                shutil.copy(path, target)
        entries.append([*entry, *classes])
    return {
        "DATASETS.REGISTER_SEM_SEG": entries,
        "DATASETS.TRAIN": [entries[0][0]],
        "DATASETS.TEST": [entries[1][0]],
    }


def panoptic_data(cfg: CfgNode, folder: Path) -> dict[str, object]:
    """Overrides for a panoptic model: a few of the digits, under the model's numbers of classes; no evaluation."""
    things, stuff = cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    name = f"walk_panoptic_{things}_{stuff}"
    prepare_digits(ROOT / "datasets")
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: DatasetCatalog.get("digits_panoptic_train")[: IMAGES["train"]])
        classes = {"thing_classes": [f"t{k}" for k in range(things)], "stuff_classes": [f"s{k}" for k in range(stuff)]}
        MetadataCatalog.get(name).set(sem_seg_root=str(folder), **classes)
    return {"DATASETS.TRAIN": [name], "DATASETS.TEST": [], "INPUT.MASK_FORMAT": "bitmask"}


def prepare(path: Path, folder: Path, entries: list[list[str]]) -> CfgNode:
    """The small config of one walk, its OUTPUT_DIR and its teacher's yaml in `folder`."""
    cfg = read(path)
    output = folder / path.parent.name / path.stem
    output.mkdir(parents=True)
    kinds = {1: label_map_data, 2: panoptic_data}
    keys = class_keys(cfg.MODEL.META_ARCHITECTURE)
    if PIXEL_CLASSES in keys:
        data = kinds[len(keys)](cfg, folder)
    else:
        data = {"DATASETS.REGISTER": entries, "DATASETS.TRAIN": [entries[0][0]], "DATASETS.TEST": [entries[1][0]]}
    overrides = {**STUDENT, **data, "OUTPUT_DIR": output}
    if cfg.KD.TEACHER.CONFIG_FILE:
        overrides["KD.TEACHER.CONFIG_FILE"] = output / "teacher.yaml"
        teacher = shrink(read(config_path(cfg.KD.TEACHER.CONFIG_FILE)))
        (output / "teacher.yaml").write_text(changes_as_yaml(teacher, kd_defaults(), ""))
    return shrink(cfg, overrides)


class Interrupt(HookBase):
    """Ctrl-C after the first step, whose checkpoint has been written."""

    def after_step(self) -> None:
        raise KeyboardInterrupt


def train(cfg: CfgNode, resume: bool) -> tuple[DistillationTrainer, list[dict[str, float]]]:
    """One step: the first, up to its checkpoint, or with `resume` the second and last."""
    seed_all_rng(1)  # as detectron2's default_setup does
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    steps: list[dict[str, float]] = []
    trainer._trainer.model.register_forward_hook(
        lambda model, _, out: steps.append({k: v.item() for k, v in out.items()}) if model.training else None
    )
    if resume:
        trainer.train()
    else:
        trainer.register_hooks([Interrupt()])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer, steps


def walk(path: Path, folder: Path, entries: list[list[str]], resumed: bool = True) -> set[str]:
    """Build what the config at `path` names, step and save; where `resumed`, also resume, step again and evaluate.

    Returns:
        The dotted keys of its config that were read on the way.
    """
    with recorded_reads() as reads:
        cfg = prepare(path, folder, entries)
        name_nodes(cfg)
        for check in data_checks(cfg, ("TRAIN", "TEST") if cfg.DATASETS.TEST else ("TRAIN",)):
            check.run()
        first, steps = train(cfg, resume=False)
        if resumed:
            continue_(cfg, first, steps)
    assert len(steps) == 1 and all(math.isfinite(value) for value in steps[0].values())
    assert any(name.startswith("loss_kd_") for name in steps[0]) == distils(cfg.KD)
    assert {"model_0000000.pth", "student.yaml"} <= set(os.listdir(cfg.OUTPUT_DIR))
    return set(reads)


def continue_(cfg: CfgNode, first: DistillationTrainer, steps: list[dict[str, float]]) -> None:
    """Resume after the first step, take the second, which is the last, and evaluate."""
    cfg.SOLVER.CHECKPOINT_PERIOD = cfg.SOLVER.MAX_ITER + 1  # the last checkpoint is written anyway
    second, resumed = train(cfg, resume=True)
    assert (first.start_iter, second.start_iter) == (0, 1)
    assert len(resumed) == 1 and steps[0].keys() == resumed[0].keys()
    assert all(math.isfinite(value) for value in resumed[0].values())
    before, after = first.checkpointer.model.state_dict(), second.checkpointer.model.state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[key], after[key]) for key in before)
    assert "model_final.pth" in os.listdir(cfg.OUTPUT_DIR)


def name_nodes(cfg: CfgNode) -> None:
    """Tell every node where it stands; copies of it know that, too."""
    for key in ["", *all_keys(cfg)]:
        node = cfg
        for part in filter(None, key.split(".")):
            node = dict.__getitem__(node, part)
        if isinstance(node, CfgNode):
            node.__dict__["__place__"] = f"{key}." if key else ""


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """The keys that are read as attributes of named nodes while the context is open."""
    reads: set[str] = set()
    original = yacs.config.CfgNode.__getattr__

    def recorded(node: CfgNode, name: str) -> object:
        if "__place__" in node.__dict__:
            reads.add(node.__dict__["__place__"] + name)
        return original(node, name)

    with mock.patch.object(yacs.config.CfgNode, "__getattr__", recorded):
        yield reads
