"""The networks against facts of the released code (see golden_networks.py), and against what timm asks of a model."""

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_checkpoint
from timm.task import LogitDistillationTask

from helpers import HELPERS
from kd_cls.data.statistics import InputStats
from kd_cls.models.cifar_net import conv3x3, init_weights
from kd_cls.models.cifar_resnet import CifarResNet
from kd_cls.models.cifar_vgg import CifarVGG
from kd_cls.models.cifar_wrn import CifarWideResNet
from kd_cls.models.factory import build_student, input_stats
from kd_cls.task.teacher import build_teacher
from kd_core.utils.errors import UserError

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
STATES = json.loads((GOLDEN / "cifar_state_dicts.json").read_text())
OUTPUTS = json.loads((GOLDEN / "cifar_outputs.json").read_text())
# Parameters at 100 classes, measured on the released code.
PARAMETERS = {
    "cifar_resnet20": 278_324,
    "cifar_resnet32": 472_756,
    "cifar_resnet56": 861_620,
    "cifar_resnet110": 1_736_564,
    "cifar_resnet8x4": 1_233_540,
    "cifar_resnet32x4": 7_433_860,
    "cifar_wrn_16_2": 703_284,
    "cifar_wrn_40_1": 569_780,
    "cifar_wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflev1": 949_258,
    "cifar_shufflev2": 1_355_528,
    "cifar_resnet50": 23_705_252,
}
ONE_PER_FAMILY = [
    "cifar_resnet8x4",
    "cifar_resnet18",
    "cifar_wrn_16_1",
    "cifar_vgg8",
    "cifar_mobilenetv2",
    "cifar_shufflev1",
    "cifar_shufflev2",
]


@pytest.fixture(scope="module")
def golden_networks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_networks", HELPERS / "golden_networks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_importing_the_package_registers_every_network_with_timm() -> None:
    assert sorted([*timm.list_models("cifar_*"), "kd_mobilenetv1"]) == sorted(STATES)
    assert timm.is_model("kd_mobilenetv1")
    assert timm.list_models(module="cifar_resnetv2") == ["cifar_resnet18", "cifar_resnet50"]


@pytest.mark.parametrize("name", STATES)
def test_state_dict_has_the_published_keys_and_shapes_in_the_published_order(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    assert [(key, list(tensor.shape)) for key, tensor in state.items()] == [*STATES[name].items()]


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_are_those_of_the_released_network(name: str, golden_networks: ModuleType) -> None:
    large = name == "kd_mobilenetv1"  # the released one is for 1000 classes only
    model = timm.create_model(name, num_classes=1000 if large else golden_networks.CLASSES)
    outputs = golden_networks.formula_outputs(model, 224 if large else 32)
    for mode, expected in OUTPUTS[name].items():
        expected = torch.tensor(expected, dtype=torch.float64)
        error = (torch.tensor(outputs[mode], dtype=torch.float64) - expected).abs().max() / expected.abs().max()
        assert error < 1e-11, mode


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_count_at_100_classes_is_the_published_one(name: str, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name, num_classes=100).parameters()) == count


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_network_offers_timms_classifier_interface(name: str) -> None:
    model = timm.create_model(name, num_classes=5, in_chans=1).eval()
    images = torch.randn(2, 1, 32, 32)
    features = model.forward_features(images)
    assert features.shape[:2] == (2, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), model(images))
    assert model(images).shape == (2, model.num_classes) == (2, 5)
    model.reset_classifier(3)
    assert model(images).shape == (2, model.num_classes) == (2, 3)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_every_parameter_receives_a_gradient(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_channels_last_and_a_deep_copy_compute_the_same(name: str) -> None:
    model = timm.create_model(name, num_classes=4).double().eval()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(twin(images.contiguous(memory_format=torch.channels_last)), model(images))


@pytest.mark.parametrize("name", ["cifar_shufflev2", "cifar_vgg8"])  # a channel shuffle, a look at the input size
def test_torch_compile_needs_no_graph_break(name: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_any_input_size_is_classified(name: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    for size in (64, 96):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 4)


def test_vgg_pools_a_fourth_time_at_64_pixels_only() -> None:
    model = timm.create_model("cifar_vgg8").eval()
    sizes = {size: model.forward_features(torch.randn(1, 3, size, size)).shape[-1] for size in (32, 64, 96)}
    assert sizes == {32: 4, 64: 4, 96: 12}


def test_a_cifar_network_brings_its_own_size_mean_and_std_and_mobilenetv1_imagenets() -> None:
    config = resolve_model_data_config(timm.create_model("cifar_resnet20"))
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == (0.5071, 0.4867, 0.4408)
    assert config["std"] == (0.2675, 0.2565, 0.2761)
    config = resolve_model_data_config(timm.create_model("kd_mobilenetv1"))
    assert config["input_size"] == (3, 224, 224)
    assert config["mean"] == (0.485, 0.456, 0.406)


def test_a_published_checkpoint_loads_with_timms_own_loader(tmp_path: Path) -> None:
    trained = timm.create_model("cifar_resnet20")
    torch.save({"epoch": 240, "model": trained.state_dict()}, tmp_path / "ckpt_epoch_240.pth")
    model = timm.create_model("cifar_resnet20")
    load_checkpoint(model, str(tmp_path / "ckpt_epoch_240.pth"))
    torch.testing.assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_weights_for_other_classes_replace_all_but_the_classifier(tmp_path: Path) -> None:
    trained = timm.create_model("cifar_mobilenetv2")
    torch.save(trained.state_dict(), tmp_path / "student.pth")
    overlay = {"file": str(tmp_path / "student.pth")}
    model = timm.create_model("cifar_mobilenetv2", pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(model.conv2[0].weight, trained.conv2[0].weight, rtol=0, atol=0)
    assert model.get_classifier().out_features == 7


def test_timms_distillation_task_takes_teacher_and_student() -> None:
    student, teacher = (timm.create_model(name, num_classes=4) for name in ("cifar_resnet8", "cifar_wrn_16_1"))
    criterion = torch.nn.CrossEntropyLoss()
    task = LogitDistillationTask(student, teacher, criterion=criterion, task_loss_weight=0.5, verbose=False)
    task.train()
    result = task(torch.randn(4, 3, 32, 32), torch.arange(4))
    result["loss"].backward()
    assert result["output"].shape == (4, 4)
    assert student.conv1.weight.grad is not None


def test_dropout_before_the_classifier_is_timms_option() -> None:
    model = timm.create_model("cifar_resnet8", drop_rate=0.5)
    features = torch.ones(1, 64, 8, 8)
    assert set(model.train().forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert set(model.eval().forward_head(features, pre_logits=True).unique().tolist()) == {1.0}


def test_convolutions_start_from_the_fan_out_normal_and_linear_layers_as_asked() -> None:
    conv, linear = conv3x3(64, 128), torch.nn.Linear(400, 300)
    init_weights([conv, linear], linear_std=0.01)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert linear.bias.abs().max() == 0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(depth=21), "depth 21 is not 6n \\+ 2"),
        (lambda: CifarResNet(depth=2), "depth 2 is not 6n \\+ 2"),
        (lambda: CifarWideResNet(depth=20, widen=2), "depth 20 is not 6n \\+ 4"),
        (lambda: CifarVGG(depth=12), "VGG of depth 12 is unknown: choose one of \\[8, 11, 13, 16, 19\\]"),
        (lambda: timm.create_model("cifar_resnet8").reset_classifier(2, "max"), "has no global_pool 'max'"),
    ],
)
def test_an_impossible_network_is_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_pretrained_weights_that_nobody_published_are_refused_by_timm() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for cifar_resnet20"):
        timm.create_model("cifar_resnet20", pretrained=True)


VIT = ("MODEL.NAME", "vit_tiny_patch16_224", "DATA.INPUT_SIZE")


def test_a_network_of_one_size_gets_it_and_is_refused_others_with_the_keys_named(tiny: Callable) -> None:
    for given in ("32", "[32, 32]"):
        cfg = tiny(*VIT, 0, "MODEL.KWARGS", f"{{img_size: {given}, depth: 1}}")
        size = input_stats(cfg, build_student(cfg, 10)).size
        assert size == 32 and type(size) is int  # it goes into a checkpoint, which holds nothing of numpy's
    cfg = tiny(*VIT, 48, "MODEL.KWARGS", "{dynamic_img_size: true, depth: 1}")
    assert input_stats(cfg, build_student(cfg, 10)).size == 48
    cfg = tiny(*VIT, 32, "MODEL.KWARGS", "{depth: 1}")
    message = r"MODEL: this network takes images of 224 px, not 32 \(.*\): set DATA.INPUT_SIZE 224, or MODEL.KWARGS"
    with pytest.raises(UserError, match=message):
        input_stats(cfg, build_student(cfg, 10))


def test_a_teacher_of_one_size_keeps_it(tiny: Callable) -> None:
    teacher = ("KD.TEACHER.NAME", "vit_tiny_patch16_224", "KD.TEACHER.ALLOW_RANDOM", True, "KD.TEACHER.KWARGS")
    student = InputStats((0.5,) * 3, (0.5,) * 3, 16)
    assert build_teacher(tiny(*teacher, "{img_size: 32, depth: 1}"), 10, student).stats.size == 32
    message = r"KD.TEACHER: this network takes images of 224 px, not 64 .* set KD.TEACHER.INPUT_SIZE 224"
    with pytest.raises(UserError, match=message):
        build_teacher(tiny(*teacher, "{depth: 1}", "KD.TEACHER.INPUT_SIZE", 64), 10, student)
