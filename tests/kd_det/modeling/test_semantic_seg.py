"""Pixels as rows: plain without a loss, and with one what the formulas say, on a map and on its rows."""

import copy
from collections.abc import Callable

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from helpers.tiny_detector import TINY_PANOPTIC, TINY_SEGMENTOR, make_labelled_batch
from kd_core import DKDLoss, GDKDLoss, KDLoss
from kd_core.utils.errors import UserError
from kd_det import DistilledPanopticFPN, DistilledSemanticSegmentor, Teacher
from kd_det.config import kd_defaults, merge_list
from kd_det.config.student import student_config
from kd_det.modeling.meta_arch.registry import plain_name
from kd_det.modeling.pixels import PixelMap, PixelOptions, match_maps, pixel_rows

KINDS = {"segmentor": TINY_SEGMENTOR, "panoptic": TINY_PANOPTIC}
DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)


@pytest.fixture
def cfg_of(tmp_path) -> Callable:
    """`cfg_of(kind, "KEY", value, …)`: a tiny student's config, whose teacher is of the same kind."""

    def build(kind: str, *overrides: object):
        cfg = kd_defaults()
        cfg.merge_from_list([word for pair in KINDS[kind].items() for word in pair])
        teacher = tmp_path / f"{kind}.yaml"
        if not teacher.exists():
            teacher.write_text(cfg.dump())
        cfg.KD.TEACHER.CONFIG_FILE, cfg.OUTPUT_DIR = str(teacher), str(tmp_path / "output")
        merge_list(cfg, [str(word) for word in overrides])
        return cfg

    return build


def make(cfg) -> nn.Module:
    torch.manual_seed(0)
    return build_model(cfg).train()


def labelled(kind: str, **options) -> list[dict]:
    return make_labelled_batch(classes=KINDS[kind]["MODEL.SEM_SEG_HEAD.NUM_CLASSES"], **options)


def five_steps(model: nn.Module, kind: str) -> tuple[list[dict], dict]:
    """Losses of five steps of SGD, and what the weights are then."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), []
    with EventStorage():
        for step in range(5):
            torch.manual_seed(step)
            losses.append(model(labelled(kind, seed=step)))
            optimizer.zero_grad()
            sum(losses[-1].values()).backward()
            optimizer.step()
    return losses, {name: (p.detach(), p.grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_loss_losses_gradients_and_weights_after_five_steps_are_plain_detectron2s_to_the_bit(cfg_of, kind):
    cfg = cfg_of(kind)
    ours = make(cfg)
    plain_cfg = student_config(cfg)
    plain = make(plain_cfg)
    assert type(plain) is META_ARCH_REGISTRY.get(plain_name(cfg.MODEL.META_ARCHITECTURE)) and type(ours) is not type(
        plain
    )
    (our_losses, our_end), (losses, end) = five_steps(ours, kind), five_steps(plain, kind)
    assert all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(our_losses, losses, strict=True)
    )
    assert our_end.keys() == end.keys()
    for name, (weight, gradient) in end.items():
        assert torch.equal(our_end[name][0], weight) and torch.equal(our_end[name][1], gradient)
    plain.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_inference_is_plain_detectron2s_and_builds_no_teacher(cfg_of, kind):
    cfg = cfg_of(kind, *DKD, "KD.TEACHER.CONFIG_FILE", "no/such/file.yaml", "KD.TEACHER.ALLOW_RANDOM", False)
    batch = labelled(kind)
    with torch.no_grad():
        found, expected = (make(c).eval()(batch) for c in (cfg, student_config(cfg)))
    assert all(torch.equal(a["sem_seg"], b["sem_seg"]) for a, b in zip(found, expected, strict=True))
    if kind == "panoptic":
        assert all(
            torch.equal(a["panoptic_seg"][0], b["panoptic_seg"][0]) for a, b in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_terms_of_pixels_are_those_of_the_loss_on_the_heads_own_logits(cfg_of, kind, storage):
    model, batch = make(cfg_of(kind, *DKD, "KD.LOSS.DKD.BETA", 2.0)), labelled(kind)
    maps = []
    model.sem_seg_head.predictor.register_forward_hook(lambda _, __, out: maps.append(out))
    losses = model(batch)
    teacher = model.teacher.model
    with torch.no_grad():
        images = torch.stack([item["image"] for item in batch])
        features = teacher.backbone((images - teacher.pixel_mean) / teacher.pixel_std)
        theirs = teacher.sem_seg_head.layers(features)
    labels = torch.stack([item["sem_seg"] for item in batch])[:, 2::4, 2::4]  # centres of 4 × 4 pixels
    student, target = maps[0].movedim(1, -1)[labels != 255], labels[labels != 255]
    expected = DKDLoss(1.0, 2.0, temperature=1.0)(student, theirs.movedim(1, -1)[labels != 255], target)
    suffix = "_pixels" if kind == "panoptic" else ""
    for term, value in expected.items():
        assert_close(losses[f"loss_kd_{term}{suffix}"], value)
    assert ("loss_kd_tckd" in losses) and not teacher.sem_seg_head.training
    sum(value for name, value in losses.items() if name.endswith(f"kd{suffix}")).backward()
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0


def test_each_distillation_of_a_panoptic_model_has_its_weight(cfg_of, storage):
    found = []
    for weights in ((1.0, 1.0), (0.5, 3.0)):
        model = make(
            cfg_of("panoptic", *DKD, "KD.PANOPTIC.BOX_WEIGHT", weights[0], "KD.PANOPTIC.PIXEL_WEIGHT", weights[1])
        )
        torch.manual_seed(1)
        found.append(model(labelled("panoptic")))
    one, other = found
    for term in ("tckd", "nckd"):
        assert_close(other[f"loss_kd_{term}"], 0.5 * one[f"loss_kd_{term}"])
        assert_close(other[f"loss_kd_{term}_pixels"], 3 * one[f"loss_kd_{term}_pixels"])


def test_the_pixels_of_a_panoptic_model_have_a_softmax_where_its_boxes_have_sigmoids(cfg_of, storage):
    found = []
    for sigmoid in (False, True):
        torch.manual_seed(0)
        parts = DistilledPanopticFPN.from_config(cfg_of("panoptic", *DKD))
        for heads in (parts["roi_heads"], parts["teacher"][0].model.roi_heads):
            heads.box_predictor.use_sigmoid_ce = sigmoid  # as detectron2's main branch sets it
        model = DistilledPanopticFPN(**parts).train()
        torch.manual_seed(1)
        found.append(model(labelled("panoptic")))
    softmax, sigmoids = found
    assert softmax["loss_kd_nckd"] != sigmoids["loss_kd_nckd"]
    for term in ("loss_kd_tckd_pixels", "loss_kd_nckd_pixels"):
        assert_close(sigmoids[term], softmax[term])


@pytest.mark.parametrize("loss", [KDLoss(), DKDLoss(1.0, 2.0), GDKDLoss(1, 1, 2, k=3, temperature=1.0)], ids=repr)
def test_the_loss_on_maps_is_that_on_permuted_filtered_rows_to_the_bit(loss):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 7, 6, 10, generator=generator).unbind()
    labels = torch.randint(7, (3, 6, 10), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    rows = student.clone().permute(0, 2, 3, 1).reshape(-1, 7)[labels.flatten() != 255].requires_grad_()
    theirs = teacher.permute(0, 2, 3, 1).reshape(-1, 7)[labels.flatten() != 255]
    student.requires_grad_()
    kept = pixel_rows(PixelMap(student, labels), teacher, PixelOptions(), 255)
    ours, expected = loss(*kept), loss(rows, theirs, labels[labels != 255])
    assert all(torch.equal(ours[term], expected[term]) for term in expected)
    sum(ours.values()).backward(), sum(expected.values()).backward()
    gradient = student.grad.permute(0, 2, 3, 1)
    assert torch.equal(gradient[labels != 255], rows.grad) and gradient[labels == 255].count_nonzero() == 0


def test_an_image_of_ignored_pixels_alone_gives_zero_with_a_gradient():
    student, teacher = torch.randn(2, 1, 5, 4, 4).unbind()
    student.requires_grad_()
    kept = pixel_rows(PixelMap(student, torch.full((1, 16, 16), 255)), teacher, PixelOptions(), 255)
    loss = sum(DKDLoss()(*kept).values())
    loss.backward()
    assert loss == 0 and student.grad.eq(0).all()


def test_every_pixel_counts_for_a_loss_without_labels_and_sample_bounds_their_number():
    student, teacher = torch.randn(2, 2, 5, 8, 8).unbind()
    labels = torch.randint(5, (2, 32, 32))
    labels[0, :16] = 255
    count = {
        options: len(pixel_rows(PixelMap(student, labels), teacher, options, 255)[0])
        for options in (
            PixelOptions(), PixelOptions(ignore="none"), PixelOptions(sample=10),
            PixelOptions(ignore="none", sample=10), PixelOptions(upsample=True), PixelOptions(sample=1000),
        )
    }  # fmt: skip
    assert list(count.values()) == [64 + 32, 128, 20, 20, 32 * 32 + 16 * 32, 96]
    rows = pixel_rows(PixelMap(student, labels), teacher, PixelOptions(sample=10), 255)
    pixels = student.movedim(1, -1).reshape(-1, 5)
    assert all((pixels == row).all(1).any() for row in rows[0]) and (rows[2] < 5).all()
    assert pixel_rows(PixelMap(student, labels), teacher, PixelOptions(ignore="none"), 255)[2] is None
    assert len(pixel_rows(PixelMap(student, labels), teacher, PixelOptions(ignore="none", sample=10), 0)[0]) == 20


def test_a_teachers_map_of_another_stride_and_padding_lies_on_the_students_grid():
    column = torch.arange(32.0)  # the value of a pixel is its column, at every stride
    wide = (column + 0.5).expand(1, 1, 32, 32)
    at_8, at_4 = F.avg_pool2d(wide, 8), F.avg_pool2d(wide, 4)
    found = match_maps(at_8, (8, 8), (32, 32), (32.0, 32.0))
    assert_close(found[..., 1:-1], at_4[..., 1:-1])  # but for the edge, where a coarser map knows no more
    assert match_maps(at_4, (8, 8), (32, 32), (32.0, 32.0)) is not None
    assert torch.equal(match_maps(at_4, (8, 8), (32, 32), (32.0, 32.0)), at_4)
    assert torch.equal(match_maps(at_4, (8, 7), (32, 28), (32.0, 32.0)), at_4[..., :7])
    padded = match_maps(at_4, (8, 10), (32, 40), (32.0, 32.0))
    assert torch.equal(padded[..., :8], at_4) and torch.equal(padded[..., 8:], at_4[..., -1:].expand(1, 1, 8, 2))


def test_a_teacher_with_another_stride_channel_order_and_size_of_image_teaches(cfg_of, tmp_path, storage):
    kinds = ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", 8, "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p3', 'p4', 'p5']")
    other = cfg_of("segmentor", *kinds, "INPUT.FORMAT", "RGB", "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    (tmp_path / "other.yaml").write_text(other.dump())
    model = make(
        cfg_of("segmentor", *DKD, "KD.TEACHER.CONFIG_FILE", tmp_path / "other.yaml", "KD.TEACHER.IMAGE_SCALE", 2.0)
    )
    batch = labelled("segmentor")
    with pytest.raises(UserError, match="the inputs have no 'teacher_image'"):
        model(batch)
    for item in batch:
        item["teacher_image"] = F.interpolate(item["image"][None].float(), scale_factor=2, mode="nearest")[0].byte()
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(batch)
    teacher = model.teacher.model
    with torch.no_grad():
        images = torch.stack([item["teacher_image"].flip(0) for item in batch])
        theirs = teacher.sem_seg_head.layers(teacher.backbone((images - teacher.pixel_mean) / teacher.pixel_std))
    labels = torch.stack([item["sem_seg"] for item in batch])[:, 2::4, 2::4]
    assert theirs.shape[2:] == labels.shape[1:]  # stride 8 of twice the size
    assert_close(seen[0], theirs.movedim(1, -1)[labels != 255])


def test_teacher_images_of_different_scales_in_one_batch_are_refused(cfg_of, storage):
    model, batch = make(cfg_of("segmentor", *DKD, "KD.TEACHER.IMAGE_SCALE", 2.0)), labelled("segmentor")
    for item, factor in zip(batch, (2, 1.5), strict=True):
        item["teacher_image"] = F.interpolate(item["image"][None].float(), scale_factor=factor)[0].byte()
    with pytest.raises(UserError, match=r"in different ratios: .* give every 'teacher_image' the same scale"):
        model(batch)


def test_the_order_of_channels_that_a_keyword_names_counts_where_the_student_has_none(cfg_of, tmp_path, storage):
    other = cfg_of("segmentor", "INPUT.FORMAT", "BGR", "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    (tmp_path / "other.yaml").write_text(other.dump())
    parts, batch = make(cfg_of("segmentor")), labelled("segmentor")
    classes = other.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    options = {"backbone": parts.backbone, "sem_seg_head": parts.sem_seg_head}
    options |= {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "loss": GDKDLoss(k=3)}
    seen = {}
    for order in (None, "BGR", "RGB"):
        torch.manual_seed(0)
        files = {"num_classes": classes, "input_format": order, "allow_random": True}
        teacher = Teacher.from_files(str(tmp_path / "other.yaml"), **files)
        model = DistilledSemanticSegmentor(teacher=teacher, **options).train()
        model.loss.register_forward_pre_hook(lambda _, args, order=order: seen.update({order: args[1]}))
        model(copy.deepcopy(batch))
        model.loss._forward_pre_hooks.clear()
    assert torch.equal(seen[None], seen["BGR"]) and not torch.equal(seen["RGB"], seen["BGR"])


def test_several_teachers_are_averaged_as_log_probabilities(cfg_of, storage):
    parts = make(cfg_of("segmentor"))
    teachers = [make(cfg_of("segmentor")) for _ in range(2)]
    nn.init.normal_(teachers[1].sem_seg_head.predictor.weight)
    options = {"backbone": parts.backbone, "sem_seg_head": parts.sem_seg_head}
    options |= {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "loss": GDKDLoss(k=3)}
    model = DistilledSemanticSegmentor(teacher=[Teacher(t) for t in teachers], **options).train()
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model(labelled("segmentor"))
    batch = labelled("segmentor")
    images, labels = (torch.stack([item[key] for item in batch]) for key in ("image", "sem_seg"))
    with torch.no_grad():
        theirs = [t.sem_seg_head.layers(t.backbone((images - t.pixel_mean) / t.pixel_std)) for t in teachers]
    mean = torch.stack([z.log_softmax(1) for z in theirs]).mean(0)
    assert_close(seen[0], mean.movedim(1, -1)[labels[:, 2::4, 2::4] != 255])
    assert copy.deepcopy(model).teachers[0] is model.teachers[0] and len(seen) == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("KD.LOSS.NAME", "aekt"), "KD.LOSS.NAME aekt is defined on the classes of a box head"),
        (("KD.PIXELS.IGNORE", "none"), "KD.LOSS.NAME dkd reads its label: set KD.PIXELS.IGNORE label"),
        (("KD.PIXELS.IGNORE", "void"), "KD.PIXELS.IGNORE is 'void', expected label or none"),
        (("KD.PIXELS.SAMPLE", -1), "KD.PIXELS.SAMPLE is -1: rows per image, 0 for all"),
        (("KD.LOSS.NAME", "gdkd", "KD.LOSS.GDKD.K", 11), "KD.LOSS gdkd: .*11"),
    ],
)
def test_options_that_make_no_sense_are_refused_in_one_sentence(cfg_of, overrides, message):
    with pytest.raises(UserError, match=message):
        build_model(cfg_of("segmentor", *DKD, *overrides))


def test_a_teacher_that_cannot_teach_pixels_is_refused_by_name(cfg_of, tmp_path):
    path = tmp_path / "classes.yaml"
    path.write_text(cfg_of("segmentor", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7).dump())
    with pytest.raises(UserError, match=r"MODEL.SEM_SEG_HEAD.NUM_CLASSES 7 and the student 11: they must agree"):
        build_model(cfg_of("segmentor", *DKD, "KD.TEACHER.CONFIG_FILE", path)).load_teacher()
    path.write_text(cfg_of("segmentor", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN").dump())
    with pytest.raises(
        UserError, match="teacher of a DistilledSemanticSegmentor must be a SemanticSegmentor or PanopticFPN"
    ):
        build_model(cfg_of("segmentor", *DKD, "KD.TEACHER.CONFIG_FILE", path)).load_teacher()
