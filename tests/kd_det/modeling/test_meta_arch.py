"""DistilledRCNN: plain without a loss, distilled with one, and the same student either way."""

import copy

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError
from kd_det import DistilledRCNN, Teacher
from kd_det.config.student import copy_shared

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)


def step(model, batch, seed=0):
    """Losses and gradients of one forward and backward pass, with the proposal sampling pinned."""
    torch.manual_seed(seed)
    losses = model(copy.deepcopy(batch))
    sum(losses.values()).backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_without_a_loss_it_is_generalized_rcnn_to_the_bit(tiny_model, batch, storage):
    plain = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    ours = tiny_model("KD.LOSS.NAME", "none")
    assert plain.state_dict().keys() == ours.state_dict().keys()
    for (expected, gradients), (got, ours_gradients) in [(step(plain, batch), step(ours, batch))]:
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[k], got[k]) for k in expected)
        assert all(torch.equal(gradients[k], ours_gradients[k]) for k in gradients)


def test_a_distillation_loss_leaves_the_detection_losses_as_they_are(tiny_model, batch, storage):
    expected, _ = step(tiny_model("KD.LOSS.NAME", "none"), batch)
    got, _ = step(tiny_model(*DKD), batch)
    assert set(got) - set(expected) == {"loss_kd_tckd", "loss_kd_nckd"}
    assert all(torch.equal(expected[k], got[k]) for k in expected)


def test_distillation_reaches_box_head_and_backbone_but_not_rpn_or_box_regression(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    losses = model(batch)
    (losses["loss_kd_tckd"] + losses["loss_kd_nckd"]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert "roi_heads.box_predictor.cls_score.weight" in reached
    assert "backbone.bottom_up.stem.conv1.weight" in reached
    assert not any("proposal_generator" in name or "bbox_pred" in name for name in reached)


def test_the_loss_sees_the_students_logits_and_the_teachers_on_the_same_sampled_boxes(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
    stages = []
    original = model.distillation_losses
    model.distillation_losses = lambda views, captured: stages.extend(captured[0]) or original(views, captured)
    model(batch)
    (student, teacher, target, progress), (stage,) = seen[0], stages
    assert student is stage.student_logits
    assert progress == 0.0
    boxes = sum(len(b) for b in stage.boxes)
    assert student.shape == teacher.shape == (boxes, 11) and target.shape == (boxes,)
    own = model.teacher.model
    with torch.no_grad():
        features = own.backbone(own.preprocess_image(batch).tensor)
        pooled = own.roi_heads.box_pooler([features[f] for f in own.roi_heads.box_in_features], stage.boxes)
        expected, _ = own.roi_heads.box_predictor(own.roi_heads.box_head(pooled))
    assert torch.equal(teacher, expected)


def test_the_terms_are_those_of_the_loss_on_those_logits(tiny_model, batch, storage):
    model = tiny_model(*DKD, "KD.LOSS.DKD.ALPHA", 2.0, "KD.LOSS.DKD.BETA", 3.0)
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
    losses = model(batch)
    student, teacher, target, _ = seen[0]
    expected = DKDLoss(alpha=2.0, beta=3.0, temperature=1.0)(student, teacher, target)
    assert torch.equal(losses["loss_kd_tckd"], expected["tckd"])
    assert torch.equal(losses["loss_kd_nckd"], expected["nckd"])


def test_a_teacher_equal_to_the_student_gives_zero(tiny_model, batch, storage):
    student = tiny_model(*DKD)
    twin = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN").train()
    student.teachers = [Teacher(twin)]
    student.eval()  # batch norm as the teacher's
    student.roi_heads.train(), student.proposal_generator.train()
    student.training = True
    losses = student(batch)
    assert losses["loss_kd_tckd"].item() == pytest.approx(0, abs=1e-6)
    assert losses["loss_kd_nckd"].item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_is_outside_parameters_state_dict_and_training_mode(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    plain = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    model(batch)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    model.train()
    teacher = model.teacher.model
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_follows_to_and_is_shared_by_deepcopy(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    model.load_teacher()
    model.double()
    assert next(model.teacher.model.parameters()).dtype == torch.float64
    assert copy.deepcopy(model).teacher is model.teacher
    late = tiny_model(*DKD).double()
    late.load_teacher()  # built after the student was moved
    assert next(late.teacher.model.parameters()).dtype == torch.float64


def test_inference_builds_no_teacher(tiny_model, batch):
    model = tiny_model(*DKD, "KD.TEACHER.CONFIG_FILE", "no/such/file.yaml", "KD.TEACHER.ALLOW_RANDOM", False).eval()
    with torch.no_grad():
        detections = model(batch)
    assert len(detections) == len(batch) and "instances" in detections[0]


def test_a_student_is_traced_without_a_teacher(tiny_model, batch):
    from detectron2.export import TracingAdapter

    model = tiny_model(*DKD, "KD.TEACHER.CONFIG_FILE", "no/such/file.yaml").eval()
    inputs = [{"image": batch[0]["image"]}]
    with torch.no_grad():
        traced = torch.jit.trace(
            TracingAdapter(model, inputs, lambda m, x: m.inference(x, do_postprocess=False)[0]),
            (inputs[0]["image"],),
            check_trace=False,
        )
        assert len(traced(inputs[0]["image"])) > 0


def test_nothing_of_the_capture_stays_on_the_model(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    model(batch)
    assert "losses" not in model.roi_heads.box_predictor.__dict__
    with pytest.raises(KeyError):
        model([{"image": batch[0]["image"]}, {}])
    assert "losses" not in model.roi_heads.box_predictor.__dict__


def test_every_stage_of_a_cascade_is_distilled_from_a_single_stage_teacher(tiny_model, batch, storage):
    cascade = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)
    losses = tiny_model(*DKD, *cascade)(batch)
    assert {f"loss_kd_{term}_stage{k}" for term in ("tckd", "nckd") for k in range(3)} <= set(losses)


def test_boxes_that_are_replaced_after_the_loss_do_not_change_what_the_teacher_sees(tiny_model, batch, storage):
    fixed, replaced = tiny_model(*DKD), tiny_model(*DKD, "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", True)
    expected, _ = step(fixed, batch)
    got, _ = step(replaced, batch)
    assert torch.equal(expected["loss_kd_nckd"], got["loss_kd_nckd"])


def test_images_without_objects_are_distilled_on_background(tiny_model, batch, storage):
    empty = batch
    for item in empty:
        item["instances"] = Instances(
            (64, 64), gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0, dtype=torch.long)
        )
    losses, gradients = step(tiny_model(*DKD), empty)
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(g).all() for g in gradients.values())


def test_no_proposals_at_all_give_zero_terms(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    boxes = [Boxes(torch.zeros(0, 4)) for _ in batch]
    (logits,) = model.teacher.view(batch, "BGR").box_logits([boxes])
    assert logits.shape == (0, 11)
    terms = model.loss(torch.zeros(0, 11, requires_grad=True), logits, torch.zeros(0, dtype=torch.long))
    assert all(value.item() == 0 for value in terms.values())


def test_it_can_be_built_from_parts_without_any_config_of_ours(tiny_cfg, batch, storage):
    cfg = get_cfg()
    plain_keys = tiny_cfg("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    copy_shared(plain_keys.MODEL, cfg.MODEL)
    teacher = Teacher(build_model(cfg))
    parts = type(teacher.model).from_config(cfg)
    model = DistilledRCNN(loss=DKDLoss(temperature=1.0), teacher=teacher, **parts)
    assert {"loss_kd_tckd", "loss_kd_nckd"} <= set(model(batch))
    with pytest.raises(UserError, match="needs a teacher"):
        DistilledRCNN(loss=DKDLoss(), **parts)
