"""The papers' merged files, of the names that their released code gives, come apart into two detectors that load."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.modeling import build_backbone, build_model
from torch import Tensor

from kd_core.utils.errors import UserError
from kd_det.checkpoint.convert_classifier import mobilenet_names
from kd_det.checkpoint.split_released import released_name, split
from kd_det.config import add_timm_config

LOADS = """
import sys, torch
sys.modules["kd_det"] = None
from detectron2.config import get_cfg
from detectron2.modeling import build_model
for path in sys.argv[1:]:
    cfg = get_cfg()
    cfg.merge_from_file(path)
    build_model(cfg).load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"], strict=True)
"""


@pytest.fixture
def convert_weights(load_tool):
    return load_tool("convert_weights")


BOXES, MASKS = "COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"


def detector(depth: int, config: str = BOXES, **sizes: int) -> dict[str, Tensor]:
    """Weights of a narrow detector of detectron2's own names."""
    cfg = model_zoo.get_config(config)
    cfg.MODEL.DEVICE, cfg.MODEL.RESNETS.DEPTH = "cpu", depth
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM, cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8, 16, 8
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = sizes.get("classes", 80)
    if depth == 18:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    else:
        cfg.MODEL.RESNETS.WIDTH_PER_GROUP, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 4, 16
    return build_model(cfg).state_dict()


def merged(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the released RCNNKD's state dict."""
    fusion = {"kd_trans.abfs.0.conv1.0.weight": torch.ones(2), "kd_trans.abfs.0.conv1.1.running_var": torch.ones(2)}
    return {**student, **{f"teacher.{name}": value for name, value in teacher.items()}, **fusion}


def test_a_checkpoint_of_both_comes_apart_into_two_that_plain_detectron2_loads(tmp_path, convert_weights, capsys):
    yamls = []
    for depth, config, folder in ((18, BOXES, tmp_path / "boxes"), (50, MASKS, tmp_path / "masks")):
        folder.mkdir()
        student, teacher = detector(depth, config, classes=7), detector(50, config, classes=7)
        torch.save({"model": merged(student, teacher), "iteration": 7}, folder / "both.pth")
        arguments = [str(folder / "both.pth"), "--output", str(folder / "student.pth")]
        convert_weights.main([*arguments, "--teacher-output", str(folder / "teacher.pth")])
        assert capsys.readouterr().out.count("a whole detector") == 2
        for name, expected in (("student", student), ("teacher", teacher)):
            found = torch.load(folder / f"{name}.pth", weights_only=True)["model"]
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
            yamls.append(str(folder / f"{name}.yaml"))
    done = subprocess.run([sys.executable, "-c", LOADS, *yamls], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_backbone_beside_a_teacher_of_numpy_arrays_is_what_training_starts_from(tmp_path, convert_weights, capsys):
    backbone = {n: v for n, v in detector(18).items() if n.startswith("backbone.bottom_up.")}
    arrays = {name: value.numpy() for name, value in merged(backbone, detector(101)).items()}
    torch.save({"model": arrays, "__author__": "third", "matching_heuristics": True}, tmp_path / "start.pth")
    outputs = ["--output", str(tmp_path / "r18.pth"), "--teacher-output", str(tmp_path / "r101.pth")]
    convert_weights.main([str(tmp_path / "start.pth"), *outputs])
    assert "r18.pth: a backbone, 100 tensors" in capsys.readouterr().out
    assert not (tmp_path / "r18.yaml").exists() and (tmp_path / "r101.yaml").is_file()
    found = torch.load(tmp_path / "r18.pth", weights_only=True)["model"]
    assert all(torch.equal(found[name], backbone[name]) for name in backbone)


def test_the_released_mobilenet_gets_timms_names():
    cfg = model_zoo.get_config(BOXES)
    add_timm_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", "build_timm_fpn_backbone", 0
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.NORM = "mobilenetv2_100", "FrozenBN"
    bottom_up = build_backbone(cfg).bottom_up.state_dict()
    prefix = "backbone.bottom_up."
    released = {prefix + released_name(old): bottom_up[new] for old, new in mobilenet_names().items()}
    assert f"{prefix}features.1.conv.4.running_var" in released and f"{prefix}features.17.conv.7.bias" in released
    student, _ = split(merged(released, detector(50)))
    assert student.state_dict.keys() == {prefix + name for name in bottom_up} and not student.whole
    assert all(torch.equal(student.state_dict[prefix + name], value) for name, value in bottom_up.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("teacher.roi_heads.box_head.fc1.bias"), "the teacher lacks 1 .*box_head.fc1.bias"),
        (lambda w: w.update({"backbone.extra": torch.ones(1)}), "the student has 1 weights that .*backbone.extra"),
        (lambda w: w.update({"backbone.fpn_lateral3.bias": torch.ones(3)}), "another shape, .*fpn_lateral3.bias"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("teacher.")], "no student and teacher in one file"),
        (lambda w: [w.pop(n) for n in list(w) if ".res4.1." in n], r"blocks: only ResNets of depth"),
    ],
    ids=["lacks", "beside", "shape", "no teacher", "blocks"],
)
def test_what_fits_neither_is_named(change, message):
    weights = merged(detector(18), detector(50))
    change(weights)
    with pytest.raises(UserError, match=message):
        split(weights)


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_executed",)


def test_a_merged_file_is_never_executed_and_without_a_place_for_the_teacher_it_says_so(
    tmp_path, convert_weights, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"teacher.x": Evil()}}, "evil.pth")
    Path("zoo.pth").write_bytes(pickle.dumps({"model": {"a": np.zeros(1), "b": Evil()}}, protocol=2))
    for file in ("evil.pth", "zoo.pth"):
        with pytest.raises(SystemExit, match=f"^convert_weights: {file} is not a complete file of weights only"):
            convert_weights.main([file, "--output", "s.pth", "--teacher-output", "t.pth"])
    assert not Path("was_executed").exists() and not Path("s.pth").exists()
    torch.save({"teacher.x": torch.ones(1), "backbone.x": torch.ones(1)}, "both.pth")
    with pytest.raises(SystemExit, match=r"both.pth holds a teacher beside the student: give --teacher-output"):
        convert_weights.main(["both.pth", "--output", "s.pth"])
