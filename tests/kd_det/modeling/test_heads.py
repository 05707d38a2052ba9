"""Every pair of ROI heads: Standard, Cascade and Res5, with masks and with keypoints, and the teacher's proposals."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import BitMasks, Keypoints
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from kd_core.utils.errors import UserError
from kd_det import Teacher
from kd_det.engine.train_step import pool_in_float32
from kd_det.modeling.box_stages import capture_box_stages, capture_head_inputs
from kd_det.modeling.teacher.view import stage_logits, stages_on_teacher_proposals

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
BOTH = ("KD.PROPOSALS", "student+teacher")
HEADS = {
    "standard": (),
    "cascade": ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
    "res5": (
        "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[8, 16, 32, 64]]", "MODEL.RPN.IN_FEATURES", "['res4']",
        "MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']",
    ),
}  # fmt: skip


def teacher(tiny_cfg, *overrides):
    """A random detector of 10 classes, with its own weights."""
    torch.manual_seed(3)
    return Teacher(build_model(tiny_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *overrides)))


def run(model, batch, seed=0):
    """The losses of one training step, from one seed on."""
    torch.manual_seed(seed)
    return model(copy.deepcopy(batch))


@pytest.mark.parametrize("theirs", HEADS)
@pytest.mark.parametrize("ours", HEADS)
def test_any_head_learns_from_any_head_on_its_own_and_on_the_teachers_proposals(
    tiny_cfg, tiny_model, batch, storage, ours, theirs
):
    model = tiny_model(*DKD, *HEADS[ours])
    model.teachers = [teacher(tiny_cfg, *HEADS[theirs])]
    plain = run(model, batch)
    stages = ["_stage0", "_stage1", "_stage2"] if ours == "cascade" else [""]
    expected = {f"loss_kd_{term}{stage}" for term in ("tckd", "nckd") for stage in stages}
    assert expected == {name for name in plain if "kd" in name}
    model.proposals = "student+teacher"
    more = run(model, batch)
    assert more.keys() == plain.keys()
    for name, value in plain.items():  # the student's own losses are as they were, to the bit
        assert torch.equal(more[name], value) != ("kd" in name), name
    sum(value for name, value in more.items() if "kd" in name).backward()
    classifiers = [p.grad for n, p in model.named_parameters() if "cls_score" in n]
    assert all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in classifiers)


def captured(model, batch):
    """What the student's heads were called with and said, and what its teacher sees."""
    with capture_box_stages(model.roi_heads) as stages, capture_head_inputs(model.roi_heads) as inputs:
        super(type(model), model).forward(batch)
    return stages, inputs[0], model.teacher.view(batch, model.input_format)


class Uncopied(list):
    """Masks that must not be indexed."""

    def __init__(self, length: int):
        super().__init__([None] * length)

    def __getitem__(self, _):
        raise AssertionError("the masks were copied")


def test_the_teachers_proposals_are_sampled_and_labelled_as_the_students_own(tiny_model, batch, storage, monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, device=None, **_: torch.arange(n, device=device))
    model = tiny_model(*DKD)
    _, (features, targets), view = captured(model, batch)
    (stage,) = stages_on_teacher_proposals(model.roi_heads, features, targets, [view])
    expected = model.roi_heads.label_and_sample_proposals(view.proposals(), targets)
    assert torch.equal(stage.gt_classes, torch.cat([p.gt_classes for p in expected]))
    for ours, theirs in zip(stage.boxes, expected, strict=True):
        assert torch.equal(ours.tensor, theirs.proposal_boxes.tensor)
    assert torch.equal(stage.student_logits, stage_logits(model.roi_heads, features, stage.boxes, 0))
    assert {10} < set(stage.gt_classes.tolist())  # background, and objects
    for target in targets:  # of COCO's images half a gigabyte, if every proposal had a copy of its own
        target.gt_masks = Uncopied(len(target))
    (again,) = stages_on_teacher_proposals(model.roi_heads, features, targets, [view])
    assert torch.equal(again.gt_classes, stage.gt_classes)


def test_one_seed_draws_one_sample_of_the_teachers_proposals(tiny_model, batch, storage):
    model = tiny_model(*DKD, *BOTH)
    first, again, other = (run(model, batch, seed)["loss_kd_nckd"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_later_stages_of_a_cascade_see_the_boxes_it_made_of_the_teachers_proposals(tiny_model, batch, storage):
    model = tiny_model(*DKD, *HEADS["cascade"])
    _, (features, targets), view = captured(model, batch)
    stages = stages_on_teacher_proposals(model.roi_heads, features, targets, [view])
    assert len(stages) == 3
    for k, stage in enumerate(stages):
        assert_close(stage.student_logits, stage_logits(model.roi_heads, features, stage.boxes, k))
    assert not torch.equal(stages[0].boxes[0].tensor[:1], stages[1].boxes[0].tensor[:1])


def test_proposals_of_several_teachers_are_sampled_as_one_set(tiny_cfg, tiny_model, batch, storage):
    model = tiny_model(*DKD)
    _, (features, targets), view = captured(model, batch)
    other = teacher(tiny_cfg).view(batch, model.input_format)
    model.roi_heads.batch_size_per_image = 10_000  # all of them
    model.roi_heads.positive_fraction = 1.0
    (stage,) = stages_on_teacher_proposals(model.roi_heads, features, targets, [view, other])
    for image, (boxes, target) in enumerate(zip(stage.boxes, targets, strict=True)):
        found = sum(len(v.proposals()[image]) for v in (view, other))
        assert len(boxes) == found + len(target)


def test_what_the_teachers_rows_would_log_does_not_mix_with_the_students(tiny_model, batch):
    entries = []
    for proposals in ("student", "student+teacher"):
        with EventStorage() as storage:
            run(tiny_model(*DKD, "KD.PROPOSALS", proposals), batch)
        entries.append({name: history.values() for name, history in storage.histories().items()})
    assert entries[0] == entries[1] and "roi_head/num_fg_samples" in entries[0]


def test_a_teacher_without_an_rpn_has_no_proposals(tiny_model, batch, storage):
    model = tiny_model(*DKD, *BOTH)
    model.teacher.model.proposal_generator = None
    with pytest.raises(UserError, match=r"KD.PROPOSALS student\+teacher: the teacher has no RPN"):
        model(batch)


def test_other_heads_are_not_run_again():
    heads = ROIHeads(num_classes=10, batch_size_per_image=8, positive_fraction=0.25, proposal_matcher=None)
    with pytest.raises(UserError, match=r"KD.PROPOSALS student\+teacher runs .* but not for ROIHeads: set KD"):
        stages_on_teacher_proposals(heads, {}, [], [])


@pytest.mark.parametrize("heads", HEADS)
def test_aekt_distils_the_logits_before_its_layer_on_the_teachers_rows_too(tiny_model, batch, storage, heads):
    aekt = ("KD.LOSS.NAME", "aekt", "KD.LOSS.TEMPERATURE", 1.0, *HEADS[heads])
    plain, more = tiny_model(*aekt), tiny_model(*aekt, *BOTH)
    for model in (plain, more):  # away from the identity
        for layer in model.serialization:
            torch.nn.init.constant_(layer.bias, 0.5)
    expected, got = run(plain, batch), run(more, batch)
    assert all(torch.equal(got[name], value) for name, value in expected.items() if "kd" not in name)
    sum(value for name, value in got.items() if "kd" in name).backward()
    assert all(p.grad is None for p in more.serialization.parameters())


def test_half_precision_rows_are_joined_and_weighted(tiny_model, batch, storage):
    model = tiny_model(*DKD, *BOTH, "KD.ROWS", "weighted")
    pool_in_float32(model)
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = run(model, batch)
    assert [z.dtype for z in seen[0]] == [torch.bfloat16] * 2 and losses["loss_kd_nckd"].dtype == torch.float32
    sum(losses.values()).backward()


def test_the_loss_sees_the_rows_of_choice(tiny_model, batch, storage):
    values = {}
    for rows in ("all", "foreground", "weighted"):
        model = tiny_model(*DKD, *BOTH, "KD.ROWS", rows, "KD.BACKGROUND_WEIGHT", 0.0)
        counted = []
        model.loss.register_forward_pre_hook(lambda _, args, counted=counted: counted.append(args[2]))
        values[rows] = run(model, batch)["loss_kd_nckd"]
        assert (10 in counted[0]) == (rows != "foreground")
    assert_close(values["foreground"], values["weighted"])
    assert values["foreground"] < values["all"]


def test_a_batch_without_foreground_gives_zero_with_a_gradient_for_foreground_rows(tiny_model, batch, storage):
    for item in batch:
        item["instances"] = item["instances"][:0]
    for proposals in ("student", "student+teacher"):
        losses = run(tiny_model(*DKD, "KD.ROWS", "foreground", "KD.PROPOSALS", proposals), batch)
        assert losses["loss_kd_nckd"].item() == 0 and losses["loss_kd_nckd"].requires_grad
        sum(losses.values()).backward()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("KD.PROPOSALS", "teacher"), r"KD.PROPOSALS is 'teacher', expected student or student\+teacher"),
        (("KD.ROWS", "fg"), r"KD.ROWS is 'fg', expected all or foreground or weighted"),
        (("KD.BACKGROUND_WEIGHT", -1.0), r"KD.BACKGROUND_WEIGHT is -1.0: a weight is not below 0"),
    ],
)
def test_what_is_no_option_is_refused(tiny_model, overrides, message):
    with pytest.raises(UserError, match=message):
        tiny_model(*DKD, *overrides)


MASK = ("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8)  # fmt: skip
KEYPOINT = ("MODEL.KEYPOINT_ON", True, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)")  # fmt: skip


def annotate(batch):
    """Masks and keypoints for every box."""
    for item in batch:
        instances = item["instances"]
        x0, y0, x1, y1 = instances.gt_boxes.tensor.T
        y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
        inside = (x >= x0[:, None, None]) & (x < x1[:, None, None])
        instances.gt_masks = BitMasks(inside & (y >= y0[:, None, None]) & (y < y1[:, None, None]))
        points = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, torch.full_like(x0, 2)], dim=1)
        instances.gt_keypoints = Keypoints(points[:, None].repeat(1, 3, 1))
    return batch


@pytest.mark.parametrize("proposals", ["student", "student+teacher"])
@pytest.mark.parametrize("heads", [MASK, KEYPOINT, (*MASK, *KEYPOINT), (*MASK, *HEADS["res5"])])
def test_mask_and_keypoint_heads_train_as_ever_while_box_logits_are_distilled(
    tiny_cfg, tiny_model, batch, storage, heads, proposals
):
    batch = annotate(batch)
    plain = run(tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *heads), batch)
    model = tiny_model(*DKD, *heads, "KD.PROPOSALS", proposals)
    model.teachers = [teacher(tiny_cfg, *heads)]
    losses = run(model, batch)
    assert set(losses) - set(plain) == {"loss_kd_tckd", "loss_kd_nckd"}
    assert all(torch.equal(losses[name], value) for name, value in plain.items())
    (losses["loss_kd_tckd"] + losses["loss_kd_nckd"]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("cls_score" in name for name in reached)
    assert not any("mask_head" in name or "keypoint_head" in name for name in reached)
