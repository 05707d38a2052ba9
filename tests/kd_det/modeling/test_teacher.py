"""The teacher: its own preprocessing, all of its weights, and clear errors."""

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from kd_det.config.student import copy_shared
from kd_det.modeling.teacher.build import build_teacher
from kd_det.modeling.teacher.lazy import config_path
from kd_det.modeling.teacher.teacher import Teacher
from kd_det.modeling.teacher.view import convert_channels

RGB = {
    "INPUT": {"FORMAT": "RGB"},
    "MODEL": {"PIXEL_MEAN": [123.0, 116.0, 103.0], "PIXEL_STD": [58.0, 57.0, 56.0], "RESNETS": {"DEPTH": 101}},
}


def other_teacher(tiny_cfg, tmp_path):
    """A yaml of an RGB ResNet-101 teacher with its own mean and std, and its weights."""
    cfg = tiny_cfg()
    plain = get_cfg()
    copy_shared(cfg.MODEL, plain.MODEL)
    plain.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    plain.merge_from_other_cfg(type(plain)(RGB))
    path = tmp_path / "rgb.yaml"
    path.write_text(plain.dump())
    torch.manual_seed(7)
    model = build_model(plain).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "rgb.pth")
    return path, tmp_path / "rgb.pth", model


def test_features_of_an_rgb_teacher_beside_a_bgr_student_are_those_it_computes_on_its_own(tiny_cfg, tmp_path, batch):
    path, weights, alone = other_teacher(tiny_cfg, tmp_path)
    own = ("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.WEIGHTS", weights, "KD.TEACHER.ALLOW_RANDOM", False)
    cfg = tiny_cfg(*own, "KD.TEACHER.FOLD_BN", False)
    assert cfg.INPUT.FORMAT == "BGR"
    (teacher,) = Teacher.from_config(cfg)
    got = teacher.view(batch, cfg.INPUT.FORMAT).features
    rgb = [{"image": item["image"][[2, 1, 0]]} for item in batch]
    with torch.no_grad():
        expected = alone.backbone(alone.preprocess_image(rgb).tensor)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_channels_are_swapped_only_between_bgr_and_rgb():
    image = torch.arange(12).view(3, 2, 2)
    assert torch.equal(convert_channels(image, "BGR", "RGB"), image[[2, 1, 0]])
    assert convert_channels(image, "RGB", "RGB") is image
    with pytest.raises(ValueError, match=r"only BGR and RGB convert"):
        convert_channels(image, "YUV-BT.601", "RGB")


def test_a_name_of_the_model_zoo_is_a_config_file():
    assert config_path("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml").endswith("faster_rcnn_R_101_FPN_3x.yaml")
    with pytest.raises(
        ValueError, match=r"KD.TEACHER.CONFIG_FILE: COCO-Detection/no.yaml is neither a file nor a name"
    ):
        config_path("COCO-Detection/no.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("KD.TEACHER.CONFIG_FILE", ""), "KD.TEACHER.CONFIG_FILE is empty"),
        (("KD.TEACHER.ALLOW_RANDOM", False), "KD.TEACHER.WEIGHTS is empty"),
        (("KD.TEACHER.WEIGHTS", "no/such/weights.pth"), "KD.TEACHER.WEIGHTS: there is no file no/such/weights.pth"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", 3), "NUM_CLASSES 10 and the student 3: they must agree"),
    ],
)
def test_what_is_wrong_with_a_teacher_is_said_with_its_key(tiny_cfg, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_teacher(tiny_cfg(*overrides))


def test_weights_with_a_missing_key_do_not_train(tiny_cfg, tmp_path):
    path, weights, model = other_teacher(tiny_cfg, tmp_path)
    state = model.state_dict()
    del state["roi_heads.box_head.fc2.bias"]
    torch.save({"model": state}, weights)
    with pytest.raises(
        ValueError,
        match=r"KD.TEACHER.WEIGHTS: .* lacks 1 weights of the model, the first is roi_heads.box_head.fc2.bias",
    ):
        build_teacher(tiny_cfg("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.WEIGHTS", weights))


def test_a_resnet_101_config_with_resnet_50_weights_does_not_train(tiny_cfg, tiny_model, tmp_path):
    path, _, _ = other_teacher(tiny_cfg, tmp_path)
    torch.save({"model": tiny_model().state_dict()}, tmp_path / "r50.pth")
    with pytest.raises(ValueError, match=r"lacks .* weights of the model, the first is backbone.bottom_up.res4.6"):
        build_teacher(tiny_cfg("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.WEIGHTS", tmp_path / "r50.pth"))


def test_a_weight_of_another_shape_does_not_train(tiny_cfg, tmp_path):
    path, weights, model = other_teacher(tiny_cfg, tmp_path)
    state = model.state_dict()
    state["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(81)
    torch.save({"model": state}, weights)
    with pytest.raises(
        ValueError,
        match=r"1 weights have another shape, the first is roi_heads.box_predictor.cls_score.bias with \(81,\)",
    ):
        build_teacher(tiny_cfg("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.WEIGHTS", weights))


def test_the_yamls_own_weights_are_never_used(tiny_cfg, tmp_path):
    path, weights, _ = other_teacher(tiny_cfg, tmp_path)
    config = yaml.safe_load(path.read_text())
    config["MODEL"]["WEIGHTS"] = str(weights)
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=r"KD.TEACHER.WEIGHTS is empty"):
        build_teacher(tiny_cfg("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.ALLOW_RANDOM", False))


def test_the_student_draws_the_same_initial_weights_with_or_without_a_teacher(tiny_model):
    plain, distilled = tiny_model("KD.LOSS.NAME", "none"), tiny_model("KD.LOSS.NAME", "dkd")
    before = torch.get_rng_state()
    distilled.load_teacher()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), distilled.state_dict().values(), strict=True)
    )
