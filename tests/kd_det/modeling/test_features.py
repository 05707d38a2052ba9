"""The feature loss of detectors: which maps are compared, what is trained, what is saved."""

import copy
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn

from helpers.tiny_detector import TINY_SEGMENTOR, make_batch, make_labelled_batch
from kd_core.losses import DKDLoss, ReviewLoss, hierarchical_context_loss
from kd_core.utils.errors import UserError
from kd_det import DistilledRCNN
from kd_det.checks import check_max_iter, check_meta_architecture
from kd_det.config import merge_list
from kd_det.engine.trainer import DistillationTrainer, student_parameters
from kd_det.modeling.features import BackboneFeatures, cut_to_images
from kd_det.solver import build_optimizer, scale_to_world_size

from .test_dense import RETINANET

REVIEW = ("KD.FEATURE.NAME", "review")
DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
LEVELS = ["p2", "p3", "p4", "p5", "p6"]


def maps_of(detector, batch):
    return detector.backbone(detector.preprocess_image(batch).tensor)


def step(model, batch):
    """The losses of a forward pass, with the sampling pinned."""
    torch.manual_seed(0)
    return model(copy.deepcopy(batch))


def test_the_term_is_the_review_of_p2_to_p6(tiny_model, batch, storage):
    model = tiny_model(*REVIEW, *DKD, "KD.FEATURE.WEIGHT", 2.0)
    losses = step(model, batch)
    assert list(model.feature.pairs[0].values()) == [(name, name) for name in LEVELS]
    with torch.no_grad():
        student, teacher = ([maps_of(d, batch)[name] for name in LEVELS] for d in (model, model.teacher.model))
        fused = model.feature.losses[0].fusion(student)
    assert losses["loss_kd_review"].item() == pytest.approx(2 * hierarchical_context_loss(fused, teacher).item())
    assert model.streams() == {"tckd": "tcg", "nckd": "ncg", "review": "ncg"}


def test_all_other_losses_and_the_initial_student_are_as_without_it(tiny_model, batch, storage):
    plain, ours = tiny_model(*DKD), tiny_model(*DKD, *REVIEW)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in plain.state_dict().items())
    expected, got = step(plain, batch), step(ours, batch)
    assert set(got) - set(expected) == {"loss_kd_review"}
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_alone_it_reaches_the_backbone_and_its_own_parameters_only(tiny_model, batch, storage):
    model = tiny_model(*REVIEW)
    losses = step(model, batch)
    assert [name for name in losses if name.startswith("loss_kd")] == ["loss_kd_review"]
    losses["loss_kd_review"].backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name, _ in model.named_parameters() if name.startswith(("feature.", "backbone."))} == reached
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("options", [DKD, ()], ids=["with a logit loss", "alone"])
def test_the_state_dict_is_generalized_rcnns_and_leaves_the_fusion_as_it_is(options, tiny_model, tiny_cfg):
    model, plain = tiny_model(*REVIEW, *options), tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN")
    assert list(model.state_dict()) == list(plain.state_dict())
    before = {name: p.clone() for name, p in model.feature.state_dict().items()}
    assert not any(model.load_state_dict(plain.state_dict()))
    assert all(torch.equal(before[name], value) for name, value in model.feature.state_dict().items())
    assert list(copy.deepcopy(model).state_dict()) == list(plain.state_dict())


def test_a_teacher_of_other_width_and_levels_teaches_at_common_strides(tiny_model, tiny_cfg, batch, storage, tmp_path):
    teacher = tiny_cfg(
        *("MODEL.FPN.OUT_CHANNELS", 16, "MODEL.FPN.IN_FEATURES", "['res3','res4','res5']"),
        *("MODEL.RPN.IN_FEATURES", "['p3','p4','p5','p6']", "MODEL.ROI_HEADS.IN_FEATURES", "['p3','p4','p5']"),
        *("MODEL.ANCHOR_GENERATOR.SIZES", "[[16],[32],[64],[128]]",),
    )  # fmt: skip
    (tmp_path / "other.yaml").write_text(teacher.dump())
    model = tiny_model(*REVIEW, *DKD, "KD.TEACHER.CONFIG_FILE", tmp_path / "other.yaml")
    assert list(model.feature.pairs[0]) == [8, 16, 32, 64]
    assert model.feature.losses[0].fusion.expand[0][0].out_channels == 16
    assert step(model, batch)["loss_kd_review"] > 0


def test_heads_of_one_map_compare_it(tiny_model, batch, storage):
    c4 = (
        *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']"),
        *("MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']"),
        *("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16, 32]]"),
    )
    model = tiny_model(*REVIEW, *DKD, *c4)  # its teacher has an FPN
    assert model.feature.pairs[0] == {16: ("res4", "p4")}
    assert step(model, batch)["loss_kd_review"] > 0


def test_cascades_and_masks_have_it_once(tiny_model, storage):
    cascade = (
        *("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        *("MODEL.MASK_ON", True, "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
        *("MODEL.ROI_MASK_HEAD.NUM_CONV", 1, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8),
    )
    losses = step(tiny_model(*REVIEW, *DKD, *cascade), make_labelled_batch())
    assert sum("review" in name for name in losses) == 1 and "loss_mask" in losses


def test_a_segmentor_has_it_too(tiny_cfg, storage, tmp_path):
    cfg = tiny_cfg(*(word for pair in TINY_SEGMENTOR.items() for word in pair))
    (tmp_path / "segmentor.yaml").write_text(cfg.dump())
    merge_list(cfg, [*REVIEW, "KD.TEACHER.CONFIG_FILE", str(tmp_path / "segmentor.yaml")])
    losses = step(build_model(cfg), make_labelled_batch())
    assert {"loss_sem_seg", "loss_kd_review"} == set(losses)


def test_maps_of_a_larger_teacher_are_cut_to_the_images_and_keep_their_size(tiny_model, storage):
    model = tiny_model(*REVIEW, *DKD, "KD.TEACHER.IMAGE_SCALE", 1.5)
    batch = make_batch(size=80)
    for item in batch:
        image = item["image"][None].float()
        item["teacher_image"] = torch.nn.functional.interpolate(image, scale_factor=1.5)[0].to(torch.uint8)
    seen = []
    model.feature.losses[0].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    assert step(model, batch)["loss_kd_review"] > 0
    sizes = [[m.shape[-1] for m in maps] for maps in seen]
    assert sizes == [[20, 10, 5, 3, 2], [30, 15, 8, 4, 2]]  # 80 px and 120 px; their padding is 96 px and 128 px


def test_what_lies_outside_of_the_largest_image_is_cut():
    maps = [torch.zeros(2, 1, 16, 24), torch.zeros(2, 1, 8, 12)]
    cut = cut_to_images(maps, [4, 8], [(50, 40), (33, 89)])
    assert [tuple(m.shape[2:]) for m in cut] == [(13, 23), (7, 12)]


def test_the_maps_can_be_named_and_other_names_are_refused(tiny_model, storage):
    model = tiny_model(*REVIEW, "KD.FEATURE.IN_FEATURES", "['p4','p5']")
    assert list(model.feature.pairs[0]) == [16, 32]
    with pytest.raises(UserError, match=r"IN_FEATURES names 'p7', but the student's maps are p2, p3, p4, p5, p6"):
        tiny_model(*REVIEW, "KD.FEATURE.IN_FEATURES", "['p7']").load_teacher()


def test_a_logit_loss_with_a_term_of_the_same_name_is_refused(tiny_cfg):
    class Named(DKDLoss):
        streams = {"review": "tcg"}

    cfg = tiny_cfg(*REVIEW, *DKD)
    with pytest.raises(UserError, match=r"KD\.LOSS and KD\.FEATURE both have a term review"):
        DistilledRCNN(**{**DistilledRCNN.from_config(cfg), "loss": Named()})


def test_no_common_stride_is_refused_by_the_maps_names():
    shapes = {"p3": ShapeSpec(channels=8, stride=8)}, {"res5": ShapeSpec(channels=8, stride=32)}
    with pytest.raises(
        UserError, match=r"student's maps p3 \(stride 8\) and the teacher's res5 \(stride 32\) have"
    ):
        BackboneFeatures(ReviewLoss, shapes[0], shapes[1:])


def test_several_teachers_are_averaged(tiny_cfg, tiny_model, batch, storage, tmp_path):
    (tmp_path / "a.yaml").write_text(tiny_cfg().dump())
    (tmp_path / "b.yaml").write_text(tiny_cfg("MODEL.FPN.OUT_CHANNELS", 16).dump())
    pairs = [[str(tmp_path / name), ""] for name in ("a.yaml", "b.yaml")]
    model = tiny_model(*REVIEW, "KD.TEACHERS", pairs, "KD.TEACHER.CONFIG_FILE", "")
    found = step(model, batch)["loss_kd_review"].item()
    single = []
    for loss, teacher in zip(model.feature.losses, model.teachers, strict=True):
        with torch.no_grad():
            student, theirs = ([maps_of(d, batch)[name] for name in LEVELS] for d in (model, teacher.model))
            single.append(loss(student, theirs)["review"].item())
    assert found == pytest.approx(sum(single) / 2, rel=1e-5)


def test_inference_needs_no_teacher_and_training_says_what_is_missing(tiny_model, batch):
    model = tiny_model(*REVIEW, "KD.TEACHER.CONFIG_FILE", "nowhere.yaml")
    assert len(model.eval()(batch)) == len(batch)
    with pytest.raises(UserError, match=r"KD.TEACHER.CONFIG_FILE: nowhere.yaml is neither a file nor a name"):
        model.train().load_teacher()


def test_inference_does_not_mind_a_teacher_that_cannot_be_built(tiny_model, tiny_cfg, batch, tmp_path):
    (tmp_path / "teacher.yaml").write_text(tiny_cfg("MODEL.RESNETS.DEPTH", 18).dump())  # with the blocks of a ResNet-50
    model = tiny_model(*REVIEW, "KD.TEACHER.CONFIG_FILE", tmp_path / "teacher.yaml")
    assert len(model.eval()(batch)) == len(batch)
    with pytest.raises(AssertionError, match="RES2_OUT_CHANNELS"):
        model.train().load_teacher()


def test_what_trains_beside_the_student_is_not_counted_as_its(tiny_model):
    plain = sum(p.numel() for p in tiny_model().parameters())
    model = tiny_model(*REVIEW, "KD.LOSS.NAME", "aekt")
    assert sum(p.numel() for p in model.parameters()) > plain
    assert sum(p.numel() for p in student_parameters(model)) == plain


def test_it_is_built_by_keyword(tiny_model, tiny_cfg, batch, storage):
    cfg, model = tiny_cfg(), tiny_model(*DKD)
    own = {"teacher": model.teacher, "feature": partial(ReviewLoss, mid_channels=4)}
    model = DistilledRCNN(**DistilledRCNN.from_config(cfg) | own)
    assert model.feature.losses[0].fusion.reduce[0][0].out_channels == 4
    assert "loss_kd_review" in step(model, batch)


def test_every_parameter_of_the_fusion_is_in_the_optimizer_with_the_students_decay(tiny_model, tiny_cfg):
    for optimizer in ("sgd", "deepkd_sgd"):
        model = tiny_model(*REVIEW, *DKD)
        cfg = tiny_cfg(*REVIEW, *DKD, "SOLVER.OPTIMIZER", optimizer)
        groups = build_optimizer(cfg, model).param_groups
        decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
        # detectron2 0.5 decays every bias, those of norms too; upstream's main those of other layers.
        own = cfg.SOLVER.WEIGHT_DECAY_BIAS is None
        norms = [module for module in model.feature.modules() if isinstance(module, nn.BatchNorm2d)]
        still = {id(p) for norm in norms for p in (norm.parameters() if own else [norm.weight])}
        for name, p in model.feature.named_parameters():
            assert (id(p) in still) == (decays[id(p)] == 0), name


def test_it_needs_an_architecture_that_distils_and_a_warmup_within_the_training(tiny_cfg):
    with pytest.raises(
        UserError, match=r"KD.FEATURE.NAME is 'review' but MODEL.META_ARCHITECTURE is 'Gen"
    ):
        check_meta_architecture(tiny_cfg(*REVIEW, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"))
    with pytest.raises(UserError, match=r"KD.FEATURE.WARMUP_ITERS is 11: it must lie in \[0, 10\]"):
        check_max_iter(tiny_cfg(*REVIEW, "SOLVER.MAX_ITER", 10, "KD.FEATURE.WARMUP_ITERS", 11))
    scaled = scale_to_world_size(
        tiny_cfg("SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.IMS_PER_BATCH", 8, "KD.FEATURE.WARMUP_ITERS", 10), 4
    )
    assert scaled.KD.FEATURE.WARMUP_ITERS == 20


def test_a_training_resumes_the_fusion_and_its_file_is_plain_detectron2s(tiny_cfg, tmp_path):
    words = (
        *(*REVIEW, *DKD, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.005, "SOLVER.EMA.ENABLED", True),
        *("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.ACCUMULATE_STEPS", 2),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
        *("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", "(2,)", "SOLVER.CHECKPOINT_PERIOD", 1),
        *("DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
        *("DATALOADER.NUM_WORKERS", 0, "SEED", 1),
    )
    cfg = tiny_cfg(*words)
    whole, resumed = Path(cfg.OUTPUT_DIR), tmp_path / "resumed"
    whole.mkdir()
    seed_all_rng(1)  # the teacher's weights are random
    first = DistillationTrainer(cfg)
    first.resume_or_load(resume=False)
    first.train()
    shutil.copytree(whole, resumed)
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    cfg.OUTPUT_DIR = str(resumed)
    seed_all_rng(1)
    second = DistillationTrainer(cfg)
    second.resume_or_load(resume=True)
    assert second.start_iter == 2
    second.train()
    ends = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (whole, resumed)]
    saved = [end["trainer"]["feature_loss"] for end in ends]
    assert all(torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    assert all(torch.equal(value, ends[1]["model"][name]) for name, value in ends[0]["model"].items())
    assert list(ends[0]["ema"]) == list(ends[0]["model"])
    plain = get_cfg()
    plain.merge_from_file(str(resumed / "student.yaml"))
    student = build_model(plain)
    assert list(student.state_dict()) == list(ends[0]["model"])
    run = json.loads((resumed / "run.json").read_text())
    assert run["parameters"] == sum(p.numel() for p in student.parameters())
    broken = torch.load(resumed / "model_0000001.pth", weights_only=True)
    del broken["trainer"]["feature_loss"]
    torch.save(broken, resumed / "model_0000001.pth")
    (resumed / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(UserError, match=r"--resume: the feature loss \(KD.FEATURE\) in .*model_0000001.pth"):
        DistillationTrainer(cfg).resume_or_load(resume=True)


def test_a_one_stage_detector_has_it_too(tiny_cfg, batch, storage, tmp_path):
    cfg = tiny_cfg(*RETINANET)
    (tmp_path / "retinanet.yaml").write_text(cfg.dump())
    merge_list(cfg, [*REVIEW, "KD.TEACHER.CONFIG_FILE", str(tmp_path / "retinanet.yaml")])
    model = build_model(cfg)
    assert list(model.feature.pairs[0]) == [8, 16, 32, 64]
    assert {"loss_cls", "loss_box_reg", "loss_kd_review"} == set(step(model, batch))
