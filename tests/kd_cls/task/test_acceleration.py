"""An accelerated teacher against the network as it was loaded, and the other parts of a run that its keys affect."""

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm import create_model, list_models
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_cls.build import build_trainer
from kd_cls.checkpoint.resume import check_resumable
from kd_cls.checks import check_config
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process
from kd_cls.task.acceleration import TeacherSpeed, accelerate_teacher
from kd_cls.task.teacher import Teacher, build_teacher
from kd_core.utils.errors import UserError
from kd_core.utils.state_dict import weights_digest

STATS = InputStats((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)
FAST = TeacherSpeed(fold_bn=True, channels_last=True)
BFLOAT16 = TeacherSpeed(fold_bn=True, dtype=torch.bfloat16)


def network(name: str, **options: Any) -> nn.Module:
    """A frozen network of ten classes whose norms are as training leaves them."""
    model = create_model(name, num_classes=10, **options)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model.eval().requires_grad_(False)


def teacher(speed: TeacherSpeed, name: str = "cifar_resnet8") -> Teacher:
    return Teacher(network(name), STATS, STATS, speed=speed)


def distance(logits: Tensor, exact: Tensor) -> float:
    """The largest difference in units of the exact logits' spread."""
    return float((logits - exact).abs().max() / exact.std())


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in model.modules())


def check_accelerated(model: nn.Module, left: int, size: int) -> None:
    """The fast copy of `model` has `left` norms, and its logits are those of `model` in float32 and in float64."""
    images = torch.randn(2, 3, size, size)
    fast = accelerate_teacher(model, FAST)
    assert norms(fast) == left and distance(fast(images), model(images)) < 1e-4
    model.double()
    assert distance(accelerate_teacher(model, FAST)(images.double()), model(images.double())) <= 1e-10


# A wide ResNet normalises before it convolves: only a norm between two convolutions of a block, and one between the
# stem and a first block that projects its normalised input, follow a convolution.
LEFT = {"cifar_wrn_16_1": 7, "cifar_wrn_16_2": 6, "cifar_wrn_40_1": 19, "cifar_wrn_40_2": 18}


@pytest.mark.parametrize("name", list_models("cifar_*"))
def test_every_network_of_the_papers_is_the_same_function_without_its_norms(name: str) -> None:
    check_accelerated(network(name), LEFT.get(name, 0), size=16)


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "mobilenetv2_100",
        "test_efficientnet",
        "tf_mobilenetv3_small_minimal_100",  # padded as TensorFlow does, by a convolution of timm's own
    ],
)
def test_timms_networks_are_the_same_functions_without_their_norms(name: str) -> None:
    check_accelerated(network(name), left=0, size=32)


def test_unchanged_parameters_are_stored_once() -> None:
    model = network("test_vit")
    fast = accelerate_teacher(model, FAST)
    own = {p.data_ptr() for p in fast.parameters()} - {p.data_ptr() for p in model.parameters()}
    assert own == {fast.patch_embed.proj.weight.data_ptr()}  # the one convolution, channels last
    assert weights_digest(fast.state_dict()) == weights_digest(model.state_dict())
    assert accelerate_teacher(model, TeacherSpeed()) is model


def test_the_loaded_network_stays_in_every_state_dict_and_digest() -> None:
    fast = teacher(FAST)
    before, names = weights_digest(fast.model.state_dict()), list(fast.state_dict())
    parameters = [id(p) for p in fast.parameters()]
    images = torch.randn(2, 3, 16, 16)
    assert 0 < distance(fast(images), fast.plain(images)) < 1e-4
    assert weights_digest(fast.model.state_dict()) == before and norms(fast.model) == 9
    assert list(fast.state_dict()) == names and [id(p) for p in fast.parameters()] == parameters
    assert len(list(fast.modules())) == len(list(fast.model.modules())) + 1


def test_a_teacher_in_float64_is_folded_in_float64_before_and_after_its_first_forward() -> None:
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for forward_first in (False, True):
        fast = teacher(FAST)
        if forward_first:
            fast(images.float())
        fast.double()
        assert distance(fast(images), fast.plain(images)) <= 1e-10


def test_weights_that_are_loaded_later_are_those_that_teach() -> None:
    fast, other, images = teacher(FAST), teacher(FAST), torch.randn(2, 3, 16, 16)
    fast(images)
    fast.load_state_dict(other.state_dict())
    assert torch.equal(fast(images), other(images))


def test_a_compiled_teacher_is_the_fast_one_compiled() -> None:
    graphs, images = [], torch.randn(2, 3, 16, 16)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    fast = teacher(FAST)
    expected = fast(images)
    assert torch.allclose(fast.compile(backend=backend)(images), expected, rtol=1e-5, atol=1e-5)
    called = {str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in called) and not any("batch_norm" in name for name in called)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_log_says_once_how_far_a_smaller_type_moves_the_logits(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    fast, images = teacher(TeacherSpeed(dtype=dtype)), torch.randn(4, 3, 16, 16)
    with caplog.at_level(logging.INFO, "kd_cls"):
        logits = fast(images)
        fast(images)
        fast.cpu()(images)
    exact = fast.plain(images)
    assert logits.dtype == torch.float32 and 1e-4 < distance(logits, exact) < 0.2
    said = re.findall(r"teacher in (\w+): .* is (\S+) × their std, and (\d) of 4 rows", caplog.text)
    changed = int((logits.argmax(1) != exact.argmax(1)).sum())
    assert said == [(str(dtype)[6:], f"{distance(logits, exact):.2g}", str(changed))]


def test_a_type_of_its_own_replaces_the_tasks_autocast_and_float32_follows_it() -> None:
    images = torch.randn(2, 3, 16, 16)
    own, plain = teacher(BFLOAT16), teacher(FAST)
    alone = own(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own(images), alone)
        assert plain(images).dtype == torch.bfloat16
    assert plain(images).dtype == torch.float32


def test_a_type_in_which_the_logits_overflow_is_refused() -> None:
    fast = teacher(TeacherSpeed(dtype=torch.float16))
    fast.model.fc.weight.mul_(1e7)
    with pytest.raises(UserError, match=r"KD.TEACHER.DTYPE is 'float16', in which the teacher's logits overflow"):
        fast(torch.randn(2, 3, 16, 16))


def test_a_network_that_does_not_run_in_a_type_is_named() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1) @ torch.ones(images[0].numel(), 10)

    with pytest.raises(UserError, match=r"KD.TEACHER.DTYPE is 'bfloat16', in which the teacher does not run \(.+\): "):
        Teacher(Fixed(), STATS, STATS, speed=BFLOAT16)(torch.randn(2, 3, 16, 16))


def test_norms_are_kept_where_folding_changes_the_logits(caplog: pytest.LogCaptureFixture) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 10, 3), nn.BatchNorm2d(10)
            self.norm.running_mean.normal_()

        def forward(self, images: Tensor) -> Tensor:
            maps = self.conv(images)
            if isinstance(maps, Tensor):  # which nothing is while torch.fx traces
                return (self.norm(maps) + maps).mean((2, 3))
            return self.norm(maps).mean((2, 3))

    model, images = Asking().eval().requires_grad_(False), torch.randn(4, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        fast = accelerate_teacher(model, FAST, images)
    assert distance(fast(images), model(images)) < 1e-4 and norms(fast) == 1
    assert "teacher: folding the batch norms of Asking changes its logits; they are kept" in caplog.text


def test_a_network_that_cannot_be_copied_computes_as_it_was_loaded(caplog: pytest.LogCaptureFixture) -> None:
    classifier = nn.utils.weight_norm(nn.Linear(8 * 14 * 14, 10))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), classifier)
    fast, images = Teacher(model, STATS, STATS, speed=FAST), torch.randn(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING):
        logits = fast(images)
    assert distance(logits, fast.plain(images)) < 1e-4 and norms(fast.model) == 1
    assert "teacher: Sequential cannot be copied" in caplog.text


def test_the_keys_say_how_a_teacher_computes(tiny: Callable) -> None:
    assert build_teacher(tiny("KD.LOSS.NAME", "kd"), 10, STATS).speed == TeacherSpeed(fold_bn=True)
    options = ["KD.TEACHER.FOLD_BN", False, "KD.TEACHER.CHANNELS_LAST", True, "KD.TEACHER.DTYPE", "bfloat16"]
    speed = build_teacher(tiny("KD.LOSS.NAME", "kd", *options), 10, STATS).speed
    assert speed == TeacherSpeed(channels_last=True, dtype=torch.bfloat16)
    with pytest.raises(UserError, match=r"KD.TEACHER.DTYPE is 'int8', expected one of float32, bfloat16, float16"):
        check_config(tiny("KD.TEACHER.DTYPE", "int8"), Process(torch.device("cpu")))


def test_a_student_learns_the_same_from_a_fast_teacher(run: Callable, tmp_path: Any) -> None:
    options = ["KD.LOSS.NAME", "dkd", "SOLVER.EPOCHS", 1]
    forms = {"fast": ["KD.TEACHER.CHANNELS_LAST", True], "slow": ["KD.TEACHER.FOLD_BN", False]}
    fast, slow = (run(*options, *more, "OUTPUT_DIR", tmp_path / name)["model"] for name, more in forms.items())
    assert list(fast) == list(slow)
    for name in fast:
        assert torch.allclose(fast[name], slow[name], rtol=1e-3, atol=1e-4), name


def test_a_cache_of_one_type_is_refused_in_another(tiny: Callable, process: Process, tmp_path: Any) -> None:
    cached = ["KD.LOSS.NAME", "kd", "KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", tmp_path / "cache"]
    own = ["KD.TEACHER.DTYPE", "bfloat16"]
    build_trainer(tiny(*cached, *own), process)
    build_trainer(tiny(*cached, *own, "SOLVER.AMP.ENABLED", True), process)  # autocast is not what it computes in
    for other in ([], ["KD.TEACHER.DTYPE", "float16"], ["SOLVER.AMP.ENABLED", True]):
        with pytest.raises(UserError, match=r"cache of another precision \(torch.bfloat16, this run has"):
            build_trainer(tiny(*cached, *other), process)


def test_evaluate_reports_the_teacher_as_loaded_and_in_its_type(
    tiny: Callable, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    options = ["KD.LOSS.NAME", "kd", "KD.TEACHER.EVALUATE", True]
    with caplog.at_level(logging.INFO, "kd_cls"):
        trainer = build_trainer(tiny(*options, "KD.TEACHER.DTYPE", "bfloat16"), process)
        build_trainer(tiny(*options), process)
    found = re.findall(r"(teacher.*): top-1 (\S+)  top-5 .* on 33 images", caplog.text)
    assert [name for name, _ in found] == ["teacher", "teacher in bfloat16", "teacher"] and found[0][1] == found[2][1]
    images, target = (torch.cat(parts) for parts in zip(*trainer.loaders.val, strict=True))
    right = (trainer.task.teacher.plain(images).argmax(1) == target).float().mean()
    assert found[0][1] == f"{100 * right:.2f}"


def test_a_run_resumes_with_another_layout_and_not_with_another_dtype(tiny: Callable, run: Callable) -> None:
    options = ["KD.LOSS.NAME", "kd", "SOLVER.EPOCHS", 1]
    checkpoint = run(*options)
    check_resumable(checkpoint, tiny(*options, "KD.TEACHER.FOLD_BN", False, "KD.TEACHER.CHANNELS_LAST", True))
    with pytest.raises(UserError, match=r"KD.TEACHER.DTYPE 'float32', now it is 'bfloat16'"):
        check_resumable(checkpoint, tiny(*options, "KD.TEACHER.DTYPE", "bfloat16"))
