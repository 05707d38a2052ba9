"""The config that is derived for a student: what it takes from its teacher, and what follows from the request."""

import pytest
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_core.utils.config import changes_as_yaml, set_values
from kd_core.utils.errors import UserError
from kd_det.checks import check_backbone
from kd_det.config import kd_defaults, merge_file
from kd_det.config.derive import METHODS, Request, derive_student, set_network
from kd_det.modeling.teacher.build import yacs_teacher
from kd_det.modeling.teacher.lazy import config_path


@pytest.fixture
def teacher() -> CfgNode:
    """The built-in data's teacher: 192 px, ten classes, four images an iteration, learning rate .02."""
    cfg = kd_defaults()
    merge_file(cfg, "configs/Digits/teacher.yaml")
    return cfg


def test_classes_data_heads_and_anchors_are_the_teachers(teacher):
    cfg = derive_student(teacher, Request("resnet18"))
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledRCNN" and cfg.MODEL.RESNETS.DEPTH == 18
    for node, key in (
        ("ROI_HEADS", "NUM_CLASSES"),
        ("ANCHOR_GENERATOR", "SIZES"),
        ("FPN", "OUT_CHANNELS"),
        ("ROI_BOX_HEAD", "FC_DIM"),
    ):
        assert cfg.MODEL[node][key] == teacher.MODEL[node][key]
    assert cfg.DATASETS.TRAIN == teacher.DATASETS.TRAIN and cfg.INPUT.MIN_SIZE_TEST == 192


def test_batch_and_learning_rate_follow_the_processes_by_the_linear_rule(teacher):
    teacher.SOLVER.IMS_PER_BATCH, teacher.SOLVER.BASE_LR = 16, 0.02
    cfg = derive_student(teacher, Request("resnet18", processes=2))
    assert cfg.SOLVER.IMS_PER_BATCH == 8 and pytest.approx(0.01) == cfg.SOLVER.BASE_LR
    assert cfg.SOLVER.MAX_ITER == 2 * teacher.SOLVER.MAX_ITER  # as many images as the teacher's
    assert tuple(2 * step for step in teacher.SOLVER.STEPS) == cfg.SOLVER.STEPS


def test_steps_lie_inside_a_training_of_a_few_iterations(teacher):
    cfg = derive_student(teacher, Request("resnet18", iterations=3))
    assert all(0 < step < 3 for step in cfg.SOLVER.STEPS)


def test_epochs_are_passes_over_the_training_images(teacher):
    cfg = derive_student(teacher, Request("resnet18", epochs=3, images=1000))
    assert cfg.SOLVER.MAX_ITER == 750


def test_a_smaller_scale_shrinks_images_and_anchors_and_leaves_the_teacher_its_size(teacher):
    cfg = derive_student(teacher, Request("resnet18", scale=0.5))
    assert cfg.INPUT.MIN_SIZE_TRAIN == (96,) and cfg.INPUT.MAX_SIZE_TEST == 96
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES[0] == [8.0] and cfg.KD.TEACHER.IMAGE_SCALE == 2.0


def test_width_narrows_fpn_and_box_head_to_multiples_of_32(teacher):
    cfg = derive_student(teacher, Request("resnet18", width=0.3))
    assert cfg.MODEL.FPN.OUT_CHANNELS == 32 and cfg.MODEL.ROI_BOX_HEAD.FC_DIM == 64


def test_a_timm_student_sees_images_as_its_weights_were_trained(teacher):
    cfg = derive_student(teacher, Request("tf_efficientnet_lite0", weights="efficientnet-lite0"))
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone" and cfg.MODEL.TIMM.WEIGHTS == "efficientnet-lite0"
    assert cfg.INPUT.FORMAT == "RGB" and cfg.MODEL.PIXEL_MEAN == [127.5] * 3 and cfg.MODEL.PIXEL_STD == [127.5] * 3


def test_timms_weights_of_a_resnet_come_with_timms_network(teacher):
    cfg = derive_student(teacher, Request("resnet18", weights="timm"))
    assert cfg.MODEL.BACKBONE.NAME == "build_timm_fpn_backbone" and cfg.MODEL.WEIGHTS == ""
    assert cfg.MODEL.TIMM.NAME == "resnet18" and cfg.MODEL.TIMM.PRETRAINED and cfg.MODEL.BACKBONE.FREEZE_AT == 0


def test_the_teachers_own_network_and_optimizer_are_not_the_students(teacher):
    set_network(teacher, Request("swin_tiny_patch4_window7_224", weights="timm"))
    teacher.MODEL.TIMM.NORM, teacher.MODEL.TIMM.OUT_INDICES = "FrozenBN", [0, 1, 2, 3]
    set_values(teacher, METHODS["deepkd"] | {"SOLVER.MOMENTA": "auto"})
    cfg, default = derive_student(teacher, Request("resnet18", method="kd")), kd_defaults()
    assert cfg.MODEL.TIMM == default.MODEL.TIMM
    assert [cfg.SOLVER[key] for key in ("OPTIMIZER", "MOMENTA", "STEP")] == ["sgd", "", "paper"]
    check_backbone(cfg)


def test_without_weights_nothing_is_frozen_norms_train_and_the_warm_up_is_longer(teacher):
    scratch = derive_student(teacher, Request("resnet18"))
    pretrained = derive_student(teacher, Request("resnet18", weights="r18.pth"))
    assert scratch.MODEL.BACKBONE.FREEZE_AT == 0 and scratch.MODEL.RESNETS.NORM == "BN"
    assert pretrained.MODEL.BACKBONE.FREEZE_AT == 2 and pretrained.MODEL.RESNETS.NORM == "FrozenBN"
    assert scratch.SOLVER.CLIP_GRADIENTS.CLIP_VALUE < pretrained.SOLVER.CLIP_GRADIENTS.CLIP_VALUE


def test_the_student_of_a_teacher_without_an_fpn_has_one():
    cfg = kd_defaults()  # detectron2's defaults are a C4 detector
    student = derive_student(cfg, Request("resnet18"))
    assert student.MODEL.ROI_HEADS.NAME == "StandardROIHeads"
    assert student.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]


@pytest.mark.parametrize("student", ["resnet18", "mobilenetv3_small_050"])
def test_a_retinanet_teaches_a_retinanet_of_its_strides_and_anchors(student):
    name = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
    cfg = derive_student(yacs_teacher(name), Request(student, method="dkd"))
    cfg.MODEL.DEVICE, cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.ALLOW_RANDOM = "cpu", name, True
    model = build_model(cfg)
    assert cfg.MODEL.META_ARCHITECTURE == "DistilledRetinaNet"
    assert [model.backbone.output_shape()[level].stride for level in model.head_in_features] == [8, 16, 32, 64, 128]
    model.load_teacher()  # refuses other strides and anchors


def test_the_student_of_a_retinanet_has_images_of_the_teachers_size():
    teacher = yacs_teacher("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    with pytest.raises(UserError, match=r"--scale 0.5: the student of a RetinaNet learns anchor by anchor"):
        derive_student(teacher, Request("resnet18", scale=0.5))


def test_a_students_own_config_keeps_its_network_and_takes_the_teachers_data(teacher, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "MODEL: {META_ARCHITECTURE: GeneralizedRCNN, RESNETS: {DEPTH: 34}, ROI_HEADS: {NUM_CLASSES: 80}}\n"
        "DATASETS: {TRAIN: [coco_2017_train], TEST: [coco_2017_val]}\n"
    )
    teacher.DATASETS.REGISTER = [["mine", "mine.json", "images"]]
    teacher.DATASETS.TRAIN = ("mine",)
    cfg = derive_student(teacher, Request(str(path)))
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.RESNETS.DEPTH) == ("DistilledRCNN", 34)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 10 and cfg.DATASETS.TRAIN == ("mine",)
    assert cfg.DATASETS.REGISTER == teacher.DATASETS.REGISTER and cfg.DATASETS.TEST == teacher.DATASETS.TEST


def test_what_a_students_own_config_leaves_out_is_detectron2s_and_its_weights_count(tmp_path):
    """The teacher is an X101 with its own strides, groups and pixel statistics; the student plain detectron2's R50."""
    teacher = yacs_teacher("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {config_path('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml')}\n")
    cfg, alone = derive_student(teacher, Request(str(path))), kd_defaults()
    merge_file(alone, str(path))
    for key in ("NUM_GROUPS", "WIDTH_PER_GROUP", "STRIDE_IN_1X1", "DEPTH"):
        assert cfg.MODEL.RESNETS[key] == alone.MODEL.RESNETS[key]
    assert cfg.MODEL.PIXEL_STD == [1.0, 1.0, 1.0] and cfg.MODEL.WEIGHTS.endswith("R-50.pkl")
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE) == (1000, 5.0)


def test_a_retinanet_teaches_by_methods_that_have_a_form_for_sigmoids():
    teacher = yacs_teacher("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    assert derive_student(teacher, Request("resnet18", method="kd")).KD.DENSE.GAMMA == 0
    with pytest.raises(UserError, match=r"--method gdkd: a RetinaNet has no softmax; expected one of kd, dkd,"):
        derive_student(teacher, Request("resnet18", method="gdkd"))


@pytest.mark.parametrize("method", METHODS)
def test_the_written_yaml_reads_back_as_the_same_config(method, teacher, tmp_path):
    cfg = derive_student(teacher, Request("resnet18", method=method))
    path = tmp_path / "student.yaml"
    path.write_text(changes_as_yaml(cfg, kd_defaults(), "# derived\n"))
    again = kd_defaults()
    merge_file(again, str(path))
    assert again == cfg


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("resnet19x"), r"--student resnet19x is neither .*did you mean resnet"),
        (Request("resnet18", method="magic"), r"--method magic: expected one of kd, dkd"),
        (Request("resnet18", scale=0), r"--scale is 0"),
        (Request("resnet18", iterations=5, epochs=1), r"--iterations and --epochs"),
        (Request("resnet18", iterations=0), r"--iterations is 0: expected a number above 0"),
        (Request("resnet18", epochs=-1), r"--epochs is -1: expected a number above 0"),
        (Request("resnet18", batch=-4), r"--batch is -4: expected a number above 0"),
        (Request("my.yaml", scale=0.5, width=2, weights="w.pth"), r"--scale, --width, --student-weights with --stud"),
    ],
)
def test_a_request_that_means_nothing_is_told_in_one_sentence(request_, message, teacher):
    with pytest.raises(UserError, match=message):
        derive_student(teacher, request_)
