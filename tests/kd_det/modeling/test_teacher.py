"""The teacher: its own preprocessing, all of its weights, and clear errors."""

import pytest
import torch
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from kd_core.utils.errors import UserError
from kd_det.config.student import copy_shared
from kd_det.modeling.teacher.build import backbone_shape, build_teacher
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
    with pytest.raises(UserError, match=r"only BGR and RGB convert"):
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
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match=r"lacks .* weights of the model, the first is backbone.bottom_up.res4.6"):
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
    with pytest.raises(UserError, match=r"KD.TEACHER.WEIGHTS is empty"):
        build_teacher(tiny_cfg("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.ALLOW_RANDOM", False))


@pytest.mark.parametrize(
    ("architecture", "key"),
    [("RetinaNet", "RETINANET"), ("SemanticSegmentor", "SEM_SEG_HEAD"), ("GeneralizedRCNN", "ROI_HEADS")],
)
def test_the_number_of_classes_of_a_keyword_is_compared_with_that_of_the_teachers_architecture(
    architecture, key, tiny_cfg, tmp_path
):
    words = ("MODEL.META_ARCHITECTURE", architecture, f"MODEL.{key}.NUM_CLASSES", 7)
    (tmp_path / "t.yaml").write_text(tiny_cfg(*words).dump())
    with pytest.raises(UserError, match=rf"has MODEL\.{key}\.NUM_CLASSES 7 and the student 6"):
        Teacher.from_files(str(tmp_path / "t.yaml"), num_classes=6, allow_random=True).load()
    with pytest.raises(UserError, match=r"KD\.TEACHER\.WEIGHTS is empty"):  # what is looked at next
        Teacher.from_files(str(tmp_path / "t.yaml"), num_classes=7).load()


@BACKBONE_REGISTRY.register()
def build_reading_backbone(cfg, input_shape):
    """Reads values in its constructor, as detectron2's ViT, MViT and Swin, which no meta tensor has."""
    assert torch.linspace(0, 1, 3)[1].item() == 0.5
    return build_resnet_fpn_backbone(cfg, input_shape)


def test_the_maps_of_a_backbone_that_reads_values_are_known_and_of_an_unknown_one_it_is_said(tiny_cfg, tmp_path):
    reading = tiny_cfg("MODEL.BACKBONE.NAME", "build_reading_backbone")
    (tmp_path / "t.yaml").write_text(reading.dump())
    cfg = tiny_cfg("KD.TEACHER.CONFIG_FILE", tmp_path / "t.yaml")
    assert list(backbone_shape(cfg)) == ["p2", "p3", "p4", "p5", "p6"]
    (tmp_path / "t.yaml").write_text(tiny_cfg("MODEL.BACKBONE.NAME", "build_no_backbone").dump())
    with pytest.raises(UserError, match=r"t\.yaml: its backbone cannot be built: .*build_no_backbone"):
        backbone_shape(cfg)


def test_the_student_draws_the_same_initial_weights_with_or_without_a_teacher(tiny_model):
    plain, distilled = tiny_model("KD.LOSS.NAME", "none"), tiny_model("KD.LOSS.NAME", "dkd")
    before = torch.get_rng_state()
    distilled.load_teacher()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), distilled.state_dict().values(), strict=True)
    )
