"""DistilledRetinaNet: plain without a loss, distilled with one on the anchors, and the same student either way."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import RetinaNet, build_anchor_generator, build_model
from detectron2.utils.events import EventStorage
from torch.testing import assert_close

from helpers.tiny_detector import RETINANET
from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError
from kd_det import DistilledRetinaNet, Teacher
from kd_det.checks import failures, training_checks
from kd_det.config import kd_defaults, merge_file
from kd_det.config.student import student_config
from kd_det.modeling.meta_arch.dense import anchors_of, class_maps
from kd_det.modeling.sigmoid_loss import BinaryDKDLoss
from kd_det.modeling.teacher.build import yacs_teacher

from ..conftest import ROOT

KD = (*RETINANET, "KD.LOSS.NAME", "kd", "KD.LOSS.TEMPERATURE", 1.0, "KD.DENSE.GAMMA", 0.0)
DKD = (*RETINANET, "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "KD.LOSS.DKD.BETA", 0.25)


def train(model, batch, steps):
    """Losses of every step, gradients of the last, weights after it."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(model(copy.deepcopy(batch)))
        sum(losses[-1].values()).backward()
        optimizer.step()
    return losses, {name: p.grad for name, p in model.named_parameters()}, model.state_dict()


def test_without_a_loss_it_is_a_retinanet_to_the_bit_for_five_steps(retinanet, batch, storage):
    plain = retinanet("MODEL.META_ARCHITECTURE", "RetinaNet")
    ours = retinanet()
    assert type(plain) is RetinaNet and type(ours) is DistilledRetinaNet
    with torch.jit.optimized_execution(False):  # a scripted loss rounds otherwise once it is compiled
        (losses, gradients, weights), (our_losses, our_gradients, our_weights) = (
            train(model, batch, 5) for model in (plain, ours)
        )
    for expected, found in (*zip(losses, our_losses, strict=True), (gradients, our_gradients), (weights, our_weights)):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_inference_is_a_retinanets_and_builds_no_teacher(retinanet, batch):
    plain = retinanet("MODEL.META_ARCHITECTURE", "RetinaNet").eval()
    ours = retinanet(*KD, "KD.TEACHER.CONFIG_FILE", "no/such/file.yaml", "KD.TEACHER.ALLOW_RANDOM", False).eval()
    with torch.no_grad():
        for expected, found in zip(plain(batch), ours(batch), strict=True):
            expected, found = expected["instances"], found["instances"]
            assert len(expected) > 0 and torch.equal(expected.scores, found.scores)
            assert torch.equal(expected.pred_boxes.tensor, found.pred_boxes.tensor)


def test_a_students_weights_load_in_plain_detectron2(retinanet, tiny_cfg):
    plain = student_config(tiny_cfg(*KD))
    cfg = get_cfg()
    cfg.merge_from_other_cfg(plain)  # no key that detectron2 does not know
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    build_model(cfg).load_state_dict(retinanet(*KD).state_dict())


def logits_and_labels(model, batch):
    """The class logits (N, K) of a detector on a batch, level after level, and its labels (N,)."""
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    features = [features[name] for name in model.head_in_features]
    labels, _ = model.label_anchors(model.anchor_generator(features), [x["instances"] for x in batch])
    classes = model.num_classes
    rows = [z.unflatten(1, (-1, classes)).permute(0, 3, 4, 1, 2).flatten(1, 3) for z in model.head(features)[0]]
    return torch.cat(rows, 1).flatten(0, 1), torch.stack(list(labels)).flatten()


@pytest.mark.parametrize("rows", ["all", "foreground", "background"])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_terms_are_sums_over_the_anchors_divided_as_the_focal_loss_is(retinanet, batch, storage, rows, gamma):
    model = retinanet(*DKD, "KD.DENSE.ROWS", rows, "KD.DENSE.GAMMA", gamma)
    with torch.no_grad():
        student, labels = logits_and_labels(model, batch)
        teacher, _ = logits_and_labels(model.teacher.load(), batch)
    losses = model(batch)
    foreground = (labels >= 0) & (labels < 10)
    kept = {"all": labels >= 0, "foreground": foreground, "background": labels == 10}[rows]
    assert 0 < foreground.sum() < (labels == 10).sum() and (labels == -1).any()
    loss = BinaryDKDLoss(1.0, 0.25, temperature=1.0, gamma=gamma, background_logit=False, validate=False)
    for term, mean in loss(student[kept], teacher[kept], labels[kept]).items():
        assert_close(losses[f"loss_kd_{term}"], mean * kept.sum() / model.loss_normalizer, rtol=1e-4, atol=1e-6)
    assert (losses["loss_kd_tckd"] > 0) == (rows != "background")


def test_a_picture_of_the_training_leaves_the_losses_as_they_are(retinanet, batch):
    """detectron2 draws one every VIS_PERIOD iterations, from logits whose sigmoid it takes in place."""

    def step(*words: object) -> dict[str, float]:
        with EventStorage():
            losses = retinanet(*DKD, *words)(copy.deepcopy(batch))
            sum(losses.values()).backward()
        return {name: value.item() for name, value in losses.items()}

    assert step("VIS_PERIOD", 1) == step()


def test_a_distillation_loss_leaves_the_detection_losses_and_the_boxes_as_they_are(retinanet, batch, storage):
    expected = retinanet()(copy.deepcopy(batch))
    model = retinanet(*DKD)
    losses = model(copy.deepcopy(batch))
    terms = {name: losses.pop(name) for name in ("loss_kd_tckd", "loss_kd_nckd")}
    assert losses.keys() == expected.keys() and all(torch.equal(losses[k], expected[k]) for k in expected)
    sum(terms.values()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"head.cls_score.weight", "backbone.bottom_up.stem.conv1.weight"} <= reached
    assert not any("bbox" in name for name in reached)


@pytest.mark.parametrize("rows", ["all", "foreground"])
def test_a_batch_without_objects_has_losses_with_a_gradient(retinanet, batch, storage, rows):
    model = retinanet(*DKD, "KD.DENSE.ROWS", rows)
    for item in batch:
        item["instances"] = item["instances"][:0]
    losses = model(batch)
    sum(losses.values()).backward()
    assert losses["loss_kd_tckd"].item() == 0 and (losses["loss_kd_nckd"].item() > 0) == (rows == "all")
    assert model.head.cls_score.weight.grad is not None


def test_the_mean_of_two_teachers_is_of_their_logits(retinanet, batch, storage):
    model = retinanet(*KD)
    torch.manual_seed(1)
    others = [retinanet("MODEL.META_ARCHITECTURE", "RetinaNet") for _ in range(2)]
    torch.nn.init.normal_(others[1].head.cls_score.weight, std=0.1)
    model.teachers = [Teacher(other) for other in others]
    with torch.no_grad():
        (student, labels), *taught = (logits_and_labels(m, batch) for m in (model, *others))
    losses = model(batch)
    kept = labels >= 0
    loss = BinaryDKDLoss(temperature=1.0, background_logit=False, validate=False)
    expected = loss(student[kept], (taught[0][0] + taught[1][0])[kept] / 2, labels[kept])["nckd"]
    assert_close(losses["loss_kd_nckd"], expected * kept.sum() / model.loss_normalizer, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (("MODEL.RETINANET.NUM_CLASSES", 7), "has MODEL.RETINANET.NUM_CLASSES 7 and the student 10"),
        (("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[1.0]]), "student has the anchors .* anchor by anchor"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [60]]), "student has the anchors .* anchor by anchor"),
        (("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5), r"student has the offset 0\.0 and its teacher 0\.5"),
        (
            ("MODEL.RETINANET.IN_FEATURES", ["p4", "p5", "p6"]),
            r"student has the strides \[8, 16, 32\] and its teacher \[16, 32, 64\]",
        ),
        (("MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), "teacher of a DistilledRetinaNet must be a RetinaNet"),
    ],
)
def test_a_teacher_whose_anchors_are_not_the_students_is_refused_by_name(retinanet, tiny_cfg, teacher, message):
    model = retinanet(*KD)
    with open(tiny_cfg().KD.TEACHER.CONFIG_FILE, "w") as file:
        file.write(tiny_cfg(*RETINANET, "MODEL.RPN.IN_FEATURES", ["p3", "p4", "p5"],
                            "MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p4", "p5"], *teacher).dump())  # fmt: skip
    with pytest.raises(UserError, match=message):
        model.load_teacher()


def test_a_teachers_anchors_are_compared_once_and_those_of_a_new_teacher_again(retinanet, batch, storage):
    model = retinanet(*KD)
    model(batch)
    del model.teacher.model.anchor_generator  # nothing else reads it
    model(batch)
    model.teachers = [Teacher(model.teacher.model)]
    with pytest.raises(AttributeError, match="anchor_generator"):
        model(batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("KD.LOSS.NAME", "gdkd"), "a one-stage detector: GDKDLoss .* takes KD.LOSS.NAME kd, or dkd"),
        (("KD.LOSS.TOPK.ENABLED", True), "a one-stage detector: KDLoss with these settings"),
        (("KD.DENSE.ROWS", "some"), "KD.DENSE.ROWS is 'some', expected all or foreground or background"),
        (("KD.DENSE.GAMMA", -1.0), "KD.DENSE.GAMMA is -1.0: the exponent of"),
        (("KD.TEACHER.IMAGE_SCALE", 2.0), "KD.TEACHER.IMAGE_SCALE is 2.0, but DistilledRetinaNet learns anchor by"),
        (("DATASETS.TRAIN", "('digits_train',)", "MODEL.RETINANET.NUM_CLASSES", 7),
         "digits_train has 10 classes: MODEL.RETINANET.NUM_CLASSES 7 does not fit"),
    ],
)  # fmt: skip
def test_a_setting_that_means_nothing_here_is_refused_before_the_training(tiny_cfg, words, message):
    found = failures(training_checks(tiny_cfg(*KD, *words)))
    assert any(re.search(message, text) for text in found), found


def test_it_is_built_by_keyword(retinanet, batch, storage):
    parts = retinanet("MODEL.META_ARCHITECTURE", "RetinaNet")
    names = ("backbone", "head", "head_in_features", "anchor_generator", "box2box_transform", "anchor_matcher")
    kwargs = {name: getattr(parts, name) for name in (*names, "num_classes")}
    kwargs.update(pixel_mean=(100.0,) * 3, pixel_std=(1.0,) * 3)
    teacher = Teacher(retinanet("MODEL.META_ARCHITECTURE", "RetinaNet"))
    student = DistilledRetinaNet(loss=DKDLoss(temperature=1.0), teacher=teacher, gamma=2.0, rows="background", **kwargs)
    assert student.loss.gamma == 2.0 and student(batch)["loss_kd_nckd"].requires_grad
    with pytest.raises(UserError, match="needs a teacher"):
        DistilledRetinaNet(loss=DKDLoss(), **kwargs)


def test_a_teacher_in_bfloat16_classifies_in_float32(retinanet, batch, storage):
    model = retinanet(*KD, "KD.TEACHER.DTYPE", "bfloat16", "KD.TEACHER.CHANNELS_LAST", True)
    own, exact = model.teacher.load(), retinanet(*KD).teacher.load()
    exact.load_state_dict(own.state_dict())
    with torch.no_grad():
        views = [Teacher(detector).view(batch, "BGR") for detector in (own, exact)]
        found, expected = (class_maps(view.model.head, [view.features["p3"]])[0] for view in views)
    assert own.head.cls_subnet[0].weight.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_the_model_zoos_retinanet_has_the_anchors_of_the_coco_student():
    zoo, ours = yacs_teacher("COCO-Detection/retinanet_R_101_FPN_3x.yaml"), kd_defaults()
    merge_file(ours, str(ROOT / "configs/COCO/dkd_retinanet_r18_r101.yaml"))
    generators = []
    for cfg in (zoo, ours):
        cfg.MODEL.DEVICE = "cpu"
        shapes = [ShapeSpec(channels=8, stride=2**level) for level in range(3, 8)]
        generators.append(SimpleNamespace(anchor_generator=build_anchor_generator(cfg, shapes)))
    assert zoo.MODEL.META_ARCHITECTURE == "RetinaNet" and anchors_of(generators[0]) == anchors_of(generators[1])
