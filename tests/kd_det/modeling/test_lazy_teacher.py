"""Teachers from LazyConfig files: detectron2's own, and files that are wrong in one way each."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from helpers.tiny_detector import make_batch
from kd_core.utils.errors import UserError
from kd_det import DistilledRCNN
from kd_det.config import kd_defaults
from kd_det.modeling.backbone import TimmBackbone
from kd_det.modeling.teacher.build import backbone_shape, build_teacher, teacher_config
from kd_det.modeling.teacher.lazy import as_yacs, load_lazy
from kd_det.modeling.teacher.view import fit_square

LSJ = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"  # the same name in detectron2 0.5 and main
SMALL = ["model.roi_heads.num_classes=10", "model.roi_heads.box_head.conv_dims=[8]"]


@pytest.fixture
def lazy_cfg(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., CfgNode]:
    """`lazy_cfg("KEY", value, …)`: a tiny DKD student of detectron2's Mask R-CNN LSJ baseline for ten classes."""

    def build(*overrides: object) -> CfgNode:
        cfg = tiny_cfg("KD.LOSS.NAME", "dkd")
        cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.OVERRIDES = LSJ, SMALL
        cfg.merge_from_list(list(overrides))
        return cfg

    return build


def test_a_student_learns_from_the_model_of_a_lazy_config(lazy_cfg):
    torch.manual_seed(0)
    student = DistilledRCNN(lazy_cfg()).train()
    with EventStorage():
        losses = student(make_batch())
    assert losses["loss_kd_nckd"].item() > 0 and losses["loss_kd_nckd"].requires_grad
    assert student.teacher.model.roi_heads.box_head.conv1.out_channels == 8


def test_the_teachers_weights_come_from_the_weights_file_alone(lazy_cfg, tmp_path):
    torch.manual_seed(1)
    model = build_teacher(lazy_cfg())
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    torch.manual_seed(2)
    again = build_teacher(lazy_cfg("KD.TEACHER.WEIGHTS", str(tmp_path / "teacher.pth")))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_its_input_data_and_schedule_are_read_and_the_rest_of_the_file_ignored():
    cfg = as_yacs(load_lazy(LSJ))
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80 and cfg.INPUT.FORMAT == "BGR"
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (64, 184375, 0.1)


def test_a_list_of_teachers_takes_overrides_after_the_weights(lazy_cfg):
    cfg = lazy_cfg()
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.OVERRIDES = "", []
    cfg.KD.TEACHERS = [[LSJ, "", *SMALL], [LSJ, "", *SMALL]]
    student = DistilledRCNN(cfg)
    assert len(student.teachers) == 2 and student.teachers[1].model.roi_heads.num_classes == 10


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("x = 1", [], r"teacher\.py has no `model`"),
        ("import no_such_package", [], r"cannot be loaded \(ModuleNotFoundError: No module named 'no_such_package'\)"),
        ("def f(:", [], r"cannot be loaded \(SyntaxError"),
        (None, ["nonsense"], r"KD\.TEACHER\.OVERRIDES .*nonsense"),
        (None, ["model.backbone.depth=4"], r"its `model` cannot be built \(TypeError: .*depth"),
    ],
)
def test_a_file_or_an_override_that_is_wrong_is_told_in_one_sentence(lazy_cfg, tmp_path, text, overrides, message):
    cfg = lazy_cfg()
    if text is not None:
        (tmp_path / "teacher.py").write_text(text)
        cfg.KD.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.py")
        cfg.KD.TEACHER.OVERRIDES = []
    cfg.KD.TEACHER.OVERRIDES = [*cfg.KD.TEACHER.OVERRIDES, *overrides]
    with pytest.raises(UserError, match=message):
        build_teacher(cfg)


def test_another_number_of_classes_is_refused_with_both_numbers(lazy_cfg):
    cfg = lazy_cfg()
    cfg.KD.TEACHER.OVERRIDES = SMALL[1:]
    with pytest.raises(UserError, match="NUM_CLASSES 80 and the student 10"):
        teacher_config(cfg)


def test_a_file_of_ones_own_is_taken_by_path(lazy_cfg, tmp_path: Path):
    lines = ("from detectron2 import model_zoo", f"model = model_zoo.get_config({LSJ!r}).model", "")
    (tmp_path / "mine.py").write_text("\n".join(lines))
    cfg = lazy_cfg("KD.TEACHER.CONFIG_FILE", str(tmp_path / "mine.py"))
    assert build_teacher(cfg).roi_heads.num_classes == 10


def test_overrides_of_a_yaml_teacher_are_refused(lazy_cfg, tmp_path):
    (tmp_path / "teacher.yaml").write_text("VERSION: 2\n")
    with pytest.raises(UserError, match=r"KD\.TEACHER\.OVERRIDES is for LazyConfigs"):
        teacher_config(lazy_cfg("KD.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")))


def test_an_image_is_made_to_fit_a_square_and_never_enlarged():
    image = torch.arange(3 * 40 * 60, dtype=torch.uint8).reshape(3, 40, 60)
    assert fit_square(image, 64) is image
    assert fit_square(image, 30).shape == (3, 20, 30) and fit_square(image, 30).dtype == torch.uint8


def test_start_weights_of_a_timm_network_are_not_fetched_for_a_teacher(tmp_path):
    path = tmp_path / "t.py"
    path.write_text(f"""
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from kd_det.modeling.backbone import timm_bottom_up
model = model_zoo.get_config("{LSJ}").model
model.backbone.bottom_up = L(timm_bottom_up)(name="resnet10t", weights="no/such/file.pth")
model.backbone.in_features = ["res2", "res3", "res4", "res5"]
""")
    cfg = kd_defaults()
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.ALLOW_RANDOM, cfg.MODEL.DEVICE = str(path), True, "cpu"
    assert list(backbone_shape(cfg)) == ["p2", "p3", "p4", "p5", "p6"]
    assert isinstance(build_teacher(cfg).backbone.bottom_up, TimmBackbone)


def test_the_classes_of_a_segmentation_head_are_read():
    cfg = load_lazy("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py", ["model.sem_seg_head.num_classes=11"])
    found = as_yacs(cfg).MODEL
    assert found.SEM_SEG_HEAD.NUM_CLASSES == 11 and found.ROI_HEADS.NUM_CLASSES == 80
