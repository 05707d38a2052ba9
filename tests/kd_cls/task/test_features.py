"""The maps that a feature loss compares, and ReviewKD in a classifier's training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

import kd_cls.models  # noqa: F401  (registers the papers' networks with timm)
from helpers.golden_networks import formula_images, formula_state, summary
from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.distributed import Process
from kd_cls.task.acceleration import FastTeacher, TeacherSpeed
from kd_cls.task.features import MapReader, build_readers, choose, read_stages
from kd_core.losses import hierarchical_context_loss
from kd_core.utils.errors import UserError

RELEASED = json.loads((Path(__file__).resolve().parents[2] / "golden" / "cifar_maps.json").read_text())
# The released code cuts ShuffleNetV2's maps before the activation of one half only, and shuffles them after it.
PREACT = [name for name, kinds in RELEASED.items() if "preact_feats" in kinds and name != "cifar_shufflev2"]
REVIEW = ("KD.FEATURE.NAME", "review")


def network(name: str) -> torch.nn.Module:
    """In float64, with the weights of the released maps."""
    model = timm.create_model(name, num_classes=1000 if name == "kd_mobilenetv1" else 10).double().eval()
    model.load_state_dict(formula_state(model.state_dict()))
    return model


def size_of(model: torch.nn.Module) -> int:
    return model.pretrained_cfg["input_size"][-1]


@pytest.mark.parametrize("name", sorted(set(RELEASED) - {"cifar_resnet110", "cifar_resnet32x4", "cifar_wrn_40_2"}))
def test_the_maps_are_those_that_the_released_networks_return(name: str) -> None:
    model = network(name)
    for kind, before_activation in (("feats", False), ("preact_feats", True)):
        if kind == "preact_feats" and name not in PREACT:
            continue
        reader = read_stages(model, size_of(model), before_activation, "student")
        with torch.no_grad():
            logits, maps = reader(model, formula_images(size_of(model)))
            torch.testing.assert_close(logits, model(formula_images(size_of(model))))
        found, expected = (torch.tensor(rows, dtype=torch.float64) for rows in (summary(maps), RELEASED[name][kind]))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert reader.channels == tuple(int(row[0]) for row in expected)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "convnext_atto", "vit_tiny_patch16_224"])
def test_any_network_of_timms_has_maps_before_the_activation_that_its_stages_end_with(name: str) -> None:
    size = 224 if "vit" in name else 64
    options = {"zero_init_last": False} if "resnet" in name else {}
    model = timm.create_model(name, num_classes=5, **options).eval()
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        plain, cut = (read_stages(model, size, on, "teacher") for on in (False, True))
        (logits, maps), (_, before) = plain(model, image), cut(model, image)
    torch.testing.assert_close(logits, model(image))
    assert len(cut.taps) == (5 if "resnet" in name else 0)  # the others' stages end with a sum
    for index, (after, raw) in enumerate(zip(maps, before, strict=True)):
        torch.testing.assert_close(F.relu(raw) if index in cut.taps else raw, after)
        assert index not in cut.taps or (raw < 0).any()


def test_a_teacher_with_folded_norms_has_the_same_maps() -> None:
    for name in ("cifar_wrn_16_1", "cifar_vgg8", "cifar_resnet20"):
        model = network(name).requires_grad_(False)
        reader = read_stages(model, 32, True, "teacher")
        fast = FastTeacher(model, TeacherSpeed(fold_bn=True))
        assert fast.network is not model
        logits, maps = fast.with_maps(formula_images(32), reader)
        torch.testing.assert_close(logits, model(formula_images(32)), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(maps, reader(model, formula_images(32))[1], rtol=1e-6, atol=1e-6)


def test_the_last_map_is_what_the_classifier_gets_in_training_too() -> None:
    model = timm.create_model("cifar_resnet8", num_classes=10, drop_rate=0.5).train()
    logits, maps = read_stages(model, 32, False, "student")(model, torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(logits, model.get_classifier()(maps[-1].flatten(1)))  # one head, one dropout


@pytest.mark.parametrize("name", ["lcnet_035", "tf_mobilenetv3_small_minimal_100"])
def test_a_norm_that_holds_its_activation_is_folded_and_its_map_is_still_read(name: str) -> None:
    model = timm.create_model(name, num_classes=5).double().eval().requires_grad_(False)
    reader, images = read_stages(model, 64, True, "teacher"), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    fast = FastTeacher(model, TeacherSpeed(fold_bn=True))
    assert fast.network is not model
    logits, maps = fast.with_maps(images, reader)
    expected_logits, expected_maps = reader(model, images)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ("cifar_resnet20", "cifar_resnet56", ((0, 1, 2), (0, 1, 2))),
        ("cifar_vgg8", "cifar_vgg13", ((0, 1, 2, 3), (0, 1, 2, 3))),
        ("cifar_shufflev1", "cifar_resnet18", ((0, 1, 2), (1, 2, 3))),  # from the coarsest
        ("resnet18", "convnext_atto", ((1, 2, 3, 4), (0, 1, 2, 3))),  # the stem is not compared
    ],
)
def test_as_many_maps_are_compared_as_both_have_from_the_coarsest(
    student: str, teacher: str, pairs: tuple, tiny: Callable
) -> None:
    models = [timm.create_model(name, num_classes=10) for name in (student, teacher)]
    readers = build_readers(tiny(*REVIEW), models[0], 64, models[1], 64)
    assert tuple(reader.indices for reader in readers) == pairs
    assert all(len(reader.channels) == len(reader.indices) + 1 for reader in readers)


def test_maps_may_be_named(tiny: Callable) -> None:
    model = timm.create_model("cifar_resnet8")
    named = ("KD.FEATURE.STUDENT_MAPS", [2], "KD.FEATURE.TEACHER_MAPS", [0])
    student, teacher = build_readers(tiny(*REVIEW, *named), model, 32, model, 32)
    assert (student.channels, teacher.channels) == ((64, 64), (16, 64))
    for words, message in (
        (("KD.FEATURE.STUDENT_MAPS", [1]), r"STUDENT_MAPS \[1\] and TEACHER_MAPS \[\] must name as many maps"),
        (
            ("KD.FEATURE.STUDENT_MAPS", [2, 1], "KD.FEATURE.TEACHER_MAPS", [1, 2]),
            r"KD.FEATURE.STUDENT_MAPS is \[2, 1\]: list the maps from fine to coarse, each once",
        ),
        (("KD.FEATURE.TEACHER_MAPS", [3]), r"TEACHER_MAPS is \[3\], but the teacher CifarResNet has maps 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            build_readers(tiny(*REVIEW, *words), model, 32, model, 32)


def test_a_network_without_maps_is_refused_by_name() -> None:
    class Bare(torch.nn.Linear):
        in_chans = 3

    with pytest.raises(UserError, match=r"the student's network Bare gives no feature maps through timm's forward_int"):
        read_stages(Bare(2, 2), 32, False, "student")


def test_reading_leaves_mode_statistics_and_random_numbers_as_they_were() -> None:
    model = timm.create_model("cifar_resnet8").train()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    reader = read_stages(model, 32, True, "student")
    assert isinstance(choose(reader, [1]), MapReader) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_the_term_of_a_step_is_that_of_the_maps_read_one_by_one(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny(*REVIEW, "KD.FEATURE.WEIGHT", 2.0, "KD.LOSS.NAME", "dkd"), process)
    task = trainer.task.train()
    images, target = next(iter(trainer.loaders.train))
    student, teacher = task.trainable_module.model, task.teacher.model
    maps, targets = [], []
    x = student.stem(images)
    with torch.no_grad():
        y = teacher.stem(images)
    for layer in ("layer1", "layer2", "layer3"):
        x = student.get_submodule(layer)(x)
        maps.append(x)
        last = teacher.get_submodule(layer)[-1]
        hook = last.act2.register_forward_pre_hook(lambda _, inputs: targets.append(inputs[0].clone()))
        with torch.no_grad():
            y = teacher.get_submodule(layer)(y)
        hook.remove()
    pooled, targets = [*maps, x.mean((2, 3), keepdim=True)], [*targets, y.mean((2, 3), keepdim=True)]
    expected = 2 * hierarchical_context_loss(task.feature.fusion(pooled, targets), targets)
    result = task(images, target)
    torch.testing.assert_close(result["review"], expected, rtol=1e-4, atol=1e-5)
    assert set(result) == {"loss", "output", "task", "tckd", "nckd", "review"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL.COMPILE", True), r"review does not go with MODEL.COMPILE and KD.TEACHER.COMPILE: what is compiled"),
        (("KD.TEACHER.CACHE", "full"), r"does not go with KD.TEACHER.CACHE full: it keeps logits and no maps"),
        (("SOLVER.ACCUMULATE_STEPS", 16), r"batches of 1 image\(s\) per forward pass: BatchNorm"),
        (("KD.FEATURE.PREACT", "student"), r"KD.FEATURE.PREACT is 'student', expected one of none, teacher, both"),
    ],
)
def test_what_a_feature_loss_cannot_be_trained_with_is_refused(
    words: tuple, message: str, tiny: Callable, process: Process
) -> None:
    with pytest.raises(UserError, match=message):
        check_config(tiny(*REVIEW, *words), process)


def test_a_last_batch_with_fewer_images_than_micro_batches_trains_in_pairs(run: Callable) -> None:
    last = run(*REVIEW, "DATA.TRAIN_IMAGES", 19, "SOLVER.EPOCHS", 1, "SOLVER.ACCUMULATE_STEPS", 8)
    assert last["metadata"]["finished"]


def test_a_last_batch_of_one_image_is_refused_before_training(tiny: Callable, process: Process) -> None:
    message = r"review does not go with a last batch of one image, as 33 .* Set DATA.TRAIN_IMAGES 32"
    with pytest.raises(UserError, match=message):
        build_trainer(tiny(*REVIEW, "DATA.TRAIN_IMAGES", 33), process)
    build_trainer(tiny("DATA.TRAIN_IMAGES", 33), process)  # without a feature loss it trains
    message = r"resnet10t at 32 px does not go with a last batch of one image, as 33 .* Set DATA.TRAIN_IMAGES 32"
    with pytest.raises(UserError, match=message):
        build_trainer(tiny("DATA.TRAIN_IMAGES", 33, "MODEL.NAME", "resnet10t", "DATA.INPUT_SIZE", 32), process)
    frozen = ("MODEL.FREEZE_BN", True, "MODEL.NAME", "resnet10t", "DATA.INPUT_SIZE", 32)
    build_trainer(tiny("DATA.TRAIN_IMAGES", 33, *frozen), process)  # its BatchNorm layers count no batch
    message = r"resnet10t at 32 px does not go with micro-batches of one image .* Set fewer SOLVER.ACCUMULATE_STEPS"
    words = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE_STEPS", 4, "DATA.INPUT_SIZE", 32)
    with pytest.raises(UserError, match=message):
        build_trainer(tiny("MODEL.NAME", "resnet10t", *words), process)


def test_the_students_files_hold_no_weight_of_the_feature_loss(run: Callable, tmp_path: Path) -> None:
    last = run(*REVIEW, "SOLVER.EMA.ENABLED", True, "SOLVER.EPOCHS", 1)
    best = torch.load(tmp_path / "run" / "best.pth", weights_only=True)
    plain = timm.create_model("cifar_resnet8", num_classes=10)
    assert list(last["model"]) == list(last["model_ema"]) == list(best["model"]) == list(plain.state_dict())
    assert "feature" not in best and all(name.startswith("fusion.") for name in last["feature"])
    assert last["metadata"]["method"] == "none + review"
    timm.models.load_checkpoint(plain, str(tmp_path / "run" / "best.pth"))
