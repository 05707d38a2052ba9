"""A teacher made faster says what it says as it was built."""

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, get_norm
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage
from torch import nn
from torch.testing import assert_close

from kd_core.utils.errors import UserError
from kd_core.utils.folding import folded_weights
from kd_det import Teacher
from kd_det.checks import check_before_training
from kd_det.modeling.teacher.acceleration import TeacherSpeed, accelerate_teacher, distilled_parts, fold_detector
from kd_det.modeling.teacher.teacher import freeze
from kd_det.modeling.teacher.view import class_logits

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
KINDS = {
    "resnet-18 fpn": (
        "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 64,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "FrozenBN",
    ),
    "norms in fpn and box head, cascade": (
        "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
        "MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_BOX_HEAD.CONV_DIM", 8, "MODEL.ROI_BOX_HEAD.NORM", "BN",
        "MODEL.FPN.NORM", "BN",
    ),
    "res5": (
        "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32, 64]]", "MODEL.RPN.IN_FEATURES", "['res4']",
        "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']",
    ),
    "timm": ("MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "mobilenetv2_050"),
}  # fmt: skip
NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


@pytest.fixture
def teacher_of(tiny_cfg, tmp_path) -> Callable[..., Teacher]:
    """`teacher_of(kind, "KEY", value, …)`: the teacher of that kind under such keys, always with the same weights."""

    def build(kind: str, *overrides: object) -> Teacher:
        path, weights = tmp_path / "kind.yaml", tmp_path / "kind.pth"
        if not weights.exists():
            cfg = tiny_cfg(*KINDS[kind], "MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
            path.write_text(cfg.dump())
            model = build_model(cfg)
            disturb_norms(model)
            torch.save({"model": model.state_dict()}, weights)
        own = ("KD.TEACHER.CONFIG_FILE", path, "KD.TEACHER.WEIGHTS", weights, "KD.TEACHER.ALLOW_RANDOM", False)
        (teacher,) = Teacher.from_config(tiny_cfg(*own, *overrides))
        return teacher

    return build


def disturb_norms(model: nn.Module) -> None:
    """Statistics and weights as a training leaves them."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NORMS):
                for name, start in {"weight": 0.2, "bias": -0.3, "running_mean": -0.3, "running_var": 0.7}.items():
                    getattr(module, name).uniform_(start, start + 0.6)


def norms_in(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, NORMS)]


def saying(teacher: Teacher, batch: list[dict], dtype: torch.dtype | None = None) -> tuple[dict, list]:
    """The teacher's feature maps, and its logits on the ground truth for every stage."""
    teacher.load(dtype=dtype)
    view = teacher.view(batch, "BGR")
    boxes = [item["instances"].gt_boxes for item in batch]
    return view.features, view.box_logits([boxes] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folded_teacher_is_the_same_function_in_float64(teacher_of, batch, kind):
    plain, fast = teacher_of(kind, "KD.TEACHER.FOLD_BN", False), teacher_of(kind, "KD.TEACHER.CHANNELS_LAST", True)
    expected, ours = saying(plain, batch, torch.float64), saying(fast, batch, torch.float64)
    assert len(norms_in(plain.model)) > 15 and norms_in(fast.model) == []
    assert ours[1][0].abs().max() > 1e-3
    for name, feature in expected[0].items():
        assert ours[0][name].dtype == torch.float64 and ours[0][name].is_contiguous()
        assert_close(ours[0][name], feature, rtol=1e-10, atol=1e-10)
    for logits, given in zip(ours[1], expected[1], strict=True):
        assert_close(logits, given, rtol=1e-10, atol=1e-10)
    assert weight_names(fast.model, plain.model) == weight_names(plain.model, plain.model)
    assert not any(p.requires_grad for p in fast.model.parameters()) and not fast.model.training


def weight_names(model: nn.Module, with_norms: nn.Module) -> set[str]:
    """Names of what is in a checkpoint, but for norms and biases, which a convolution before a norm does not have."""
    norms = tuple(f"{name}." for name in norms_in(with_norms))
    return {name for name in model.state_dict() if not name.startswith(norms) and not name.endswith(".bias")}


def test_a_detector_that_is_handed_over_stays_as_it_is(tiny_model, batch):
    model = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saying(Teacher(model), batch)
    saying(Teacher(lambda: model), batch)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert "forward" not in vars(model.backbone)


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", "SyncBN", "naiveSyncBN"])
def test_every_batch_norm_of_detectron2_folds_and_no_other(tiny_model, norm):
    model = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN").double()
    conv = model.backbone.fpn_lateral3
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    conv.norm = get_norm(norm, 8).double()
    disturb_norms(conv)
    expected = freeze(model).backbone(images)["p3"]
    fold_detector(model)
    assert conv.norm is None
    assert_close(model.backbone(images)["p3"], expected, rtol=1e-10, atol=1e-10)


def test_norms_that_are_no_fixed_map_stay(tiny_model):
    model = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    lateral = [model.backbone.fpn_lateral2, model.backbone.fpn_lateral3, model.backbone.fpn_lateral4]
    norms = [nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False), NaiveSyncBatchNorm(8).train()]
    for conv, norm in zip(lateral, norms, strict=True):
        conv.norm = norm
    fold_detector(model.eval().requires_grad_(False))
    assert lateral[0].norm is norms[0] and lateral[1].norm is norms[1] and lateral[2].norm is None
    conv = model.backbone.fpn_lateral5
    conv.norm = nn.BatchNorm2d(8).train()
    fold_detector(model)
    assert conv.norm is not None


def test_a_convolution_that_does_more_with_its_weight_is_not_touched(tiny_model):
    model = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    conv = model.backbone.fpn_lateral3

    class Standardised(type(conv)):
        def forward(self, x):
            return super().forward(x)

    conv.__class__, conv.norm = Standardised, FrozenBatchNorm2d(8)
    accelerate_teacher(freeze(model), TeacherSpeed(fold_bn=True, dtype=torch.bfloat16))
    assert conv.norm is not None and conv.weight.dtype == torch.float32
    assert model.backbone.fpn_lateral4.weight.dtype == torch.bfloat16


def test_a_float64_student_has_a_teacher_that_was_folded_in_float64(tiny_model, batch, storage, monkeypatch):
    dtypes = []
    monkeypatch.setattr(
        "kd_det.modeling.teacher.acceleration.folded_weights",
        lambda weight, *rest: dtypes.append(weight.dtype) or folded_weights(weight, *rest),
    )
    model = tiny_model(*DKD).double()
    model.load_teacher()
    assert set(dtypes) == {torch.float64} and norms_in(model.teacher.model) == []


@pytest.mark.parametrize(
    ("kind", "dtype"), [("res5", "bfloat16"), ("norms in fpn and box head, cascade", "float16"), ("timm", "float16")]
)
def test_features_in_half_precision_are_near_and_all_else_is_float32(teacher_of, batch, kind, dtype):
    plain, fast = teacher_of(kind, "KD.TEACHER.FOLD_BN", False), teacher_of(kind, "KD.TEACHER.DTYPE", dtype)
    seen = []
    for part in distilled_parts(fast.model).values():
        conv = next(m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        assert conv.weight.dtype == getattr(torch, dtype)
        conv.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    heads = fast.model.roi_heads
    pooler = heads.pooler if kind == "res5" else heads.box_pooler
    pooler.register_forward_pre_hook(lambda _, inputs: seen.extend(("pooled", f.dtype) for f in inputs[0]))
    (_, expected), (features, logits) = saying(plain, batch), saying(fast, batch)
    assert {f.dtype for f in features.values()} == {z.dtype for z in logits} == {torch.float32}
    assert set(seen) == {getattr(torch, dtype), ("pooled", torch.float32)}
    for ours, given in zip(logits, expected, strict=True):
        assert 0 < (ours - given).norm() / given.norm() < (0.1 if dtype == "bfloat16" else 0.02)


def test_a_teacher_in_float32_is_not_touched_by_the_students_autocast(teacher_of, batch):
    kind = "norms in fpn and box head, cascade"
    (_, expected), given = saying(teacher_of(kind), batch), teacher_of(kind, "KD.TEACHER.DTYPE", "float32")
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = saying(given, batch)
        _, followed = saying(teacher_of(kind), batch)
    for k, logits in enumerate(expected):
        assert_close(ours[k], logits)
        assert followed[k].dtype == torch.bfloat16 and ours[k].dtype == torch.float32


@pytest.mark.parametrize("folded", [True, False])
def test_a_fast_teacher_still_proposes_and_detects(tiny_model, batch, storage, folded):
    fast = ("KD.TEACHER.DTYPE", "bfloat16", "KD.TEACHER.CHANNELS_LAST", True, "KD.TEACHER.FOLD_BN", folded)
    model = tiny_model(*DKD, "KD.PROPOSALS", "student+teacher", *fast)
    losses = model(copy.deepcopy(batch))
    assert all(loss.isfinite() for loss in losses.values())
    with torch.no_grad():
        detections = model.teacher.model(batch)
    assert len(detections) == 2 and all("instances" in item for item in detections)


def test_weights_that_are_no_images_have_no_channels_last(tiny_model):
    detector = freeze(tiny_model())
    detector.backbone.volume = nn.Conv3d(1, 1, 1).requires_grad_(False)
    accelerate_teacher(detector, TeacherSpeed(channels_last=True))
    assert detector.backbone.volume.weight.is_contiguous()
    weights = [m.weight for m in detector.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_a_teacher_with_a_type_of_its_own_follows_the_student_in_nothing_but_its_device(tiny_model, batch, storage):
    model = tiny_model(*DKD, "KD.TEACHER.DTYPE", "bfloat16")
    early = model.teacher.load(dtype=torch.float64).backbone.fpn_lateral3
    model.double()
    assert early.weight.dtype == torch.bfloat16 and model.teacher.model.pixel_mean.dtype == torch.float32
    model.teacher.apply(lambda tensor: tensor.to("meta"))
    assert early.weight.is_meta and early.weight.dtype == torch.bfloat16


def test_losses_against_a_folded_teacher_are_those_against_it_as_it_was_built(tiny_model, batch):
    losses = []
    for folded in (True, False):
        with EventStorage():
            model = tiny_model(*DKD, "KD.TEACHER.FOLD_BN", folded)
            torch.manual_seed(1)
            losses.append(model(copy.deepcopy(batch)))
    for name, loss in losses[0].items():
        assert_close(loss, losses[1][name])
    assert any("kd" in name for name in losses[0])


def test_only_detectron2s_own_classifier_is_asked_for_logits_alone():
    class Doubled(FastRCNNOutputLayers):
        def forward(self, x):
            scores, deltas = super().forward(x)
            return 2 * scores, deltas

    predictor = FastRCNNOutputLayers.__new__(FastRCNNOutputLayers)
    nn.Module.__init__(predictor)
    predictor.cls_score, predictor.bbox_pred = nn.Linear(8, 5), nn.Linear(8, 16)
    predictor.bbox_pred.register_forward_hook(lambda *_: pytest.fail("box deltas that nobody reads"))
    x = torch.randn(3, 2, 2, 2)
    logits = class_logits(predictor, x)
    assert torch.equal(logits, predictor.cls_score(x.flatten(1)))
    predictor.bbox_pred = nn.Linear(8, 16)
    predictor.__class__ = Doubled
    assert torch.equal(class_logits(predictor, x), 2 * logits)


def test_every_listed_teacher_is_made_fast(tiny_cfg, tmp_path):
    yaml = tiny_cfg().KD.TEACHER.CONFIG_FILE
    listed = ("KD.TEACHER.CONFIG_FILE", "", "KD.TEACHERS", [[yaml, ""], [yaml, ""]], "KD.TEACHER.DTYPE", "float16")
    speed = TeacherSpeed(fold_bn=True, dtype=torch.float16)
    assert [teacher.speed for teacher in Teacher.from_config(tiny_cfg(*listed))] == [speed, speed]


def test_another_type_is_refused_by_its_key(tiny_cfg, tiny_model):
    message = r"KD.TEACHER.DTYPE is 'half', expected student or float32 or bfloat16 or float16"
    with pytest.raises(UserError, match=message):
        tiny_model(*DKD, "KD.TEACHER.DTYPE", "half")
    with pytest.raises(UserError, match=message):
        check_before_training(tiny_cfg(*DKD, "KD.TEACHER.DTYPE", "half"), resume=False)
    for key in ("FOLD_BN", "CHANNELS_LAST", "COMPILE"):
        with pytest.raises(UserError, match=f"KD.TEACHER.{key} is 'perhaps', expected"):
            tiny_cfg(f"KD.TEACHER.{key}", "perhaps")
