"""Folded batch norms: the same function as the slow path, and hands off whatever cannot be folded."""

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from kd_core.utils.folding import CONVOLUTIONS, fold_batch_norms, folded_weights


def randomised(model: nn.Module) -> nn.Module:
    """`model` frozen and in float64, its norms as training leaves them: no statistic or weight at its default."""
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
    return model.double().eval().requires_grad_(False)


def pair(norm: nn.Module | None = None, **options: bool) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, **options), norm or nn.BatchNorm2d(8), nn.ReLU())


def images() -> Tensor:
    return torch.randn(2, 3, 9, 9, dtype=torch.float64)


def check_folds(model: nn.Module, expected: int, x: Tensor | None = None) -> nn.Module:
    """Fold a copy of `model`; `expected` norms must go, and the function must stay."""
    model, x = randomised(model), images() if x is None else x
    folded = copy.deepcopy(model)
    assert fold_batch_norms(folded) == expected
    slow, fast = model(x), folded(x)
    assert (slow - fast).abs().max() <= 1e-12 * slow.abs().max()
    assert not any(p.requires_grad for p in folded.parameters())
    return folded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_the_folded_convolution_is_the_convolution_and_its_norm(bias: bool, affine: bool) -> None:
    folded = check_folds(pair(nn.BatchNorm2d(8, eps=0.1, affine=affine), bias=bias), 1)
    assert type(folded[1]) is nn.Identity


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.BatchNorm1d(6)), (2, 4, 7)),
        (nn.Sequential(nn.Conv3d(2, 4, 2, bias=False), nn.BatchNorm3d(4)), (2, 2, 4, 4, 4)),
        (
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
            (2, 4, 6, 6),
        ),
    ],
)
def test_convolutions_of_other_dimensions_groups_and_paddings_fold_too(model: nn.Module, shape: tuple) -> None:
    check_folds(model, 1, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize("norm", [BatchNormAct2d, FrozenBatchNormAct2d])
def test_timms_norm_with_activation_leaves_its_dropout_and_activation(norm: type[nn.Module]) -> None:
    silu = norm(8, act_layer=nn.SiLU, inplace=False)
    assert type(check_folds(pair(silu), 1)[1].act) is nn.SiLU  # under the name by which its map is read
    both = check_folds(pair(norm(8, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)), 1)[1]
    assert [type(step) for step in both] == [nn.Dropout2d, nn.SiLU]
    assert type(check_folds(pair(norm(8, apply_act=False)), 1)[1]) is nn.Identity


def test_norms_that_are_buffers_only_fold_as_they_are() -> None:
    check_folds(pair(FrozenBatchNorm2d(8, eps=1e-3)), 1)


def test_weights_are_folded_in_float64_and_rounded_once() -> None:
    conv, norm = randomised(pair())[:2]
    exact = folded_weights(conv.weight, conv.bias, norm)
    for dtype in (torch.float32, torch.bfloat16):
        weight = conv.weight.to(dtype).to(memory_format=torch.channels_last)
        folded = folded_weights(weight, None, norm)[0]
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        assert torch.equal(folded, (weight.double() * scale.view(-1, 1, 1, 1)).to(dtype))
        assert folded.dtype == dtype and folded.is_contiguous(memory_format=torch.channels_last)
    x = images()
    assert torch.allclose(F.conv2d(x, *exact), norm(conv(x)), rtol=0, atol=1e-12)


class Twice(nn.Module):
    """A convolution whose output, or which itself, is used a second time, as `how` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how
        self.other = self.norm if how == "shared norm" else nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        between = self.conv(x)
        result = self.norm(between)
        match self.how:
            case "output":
                result = result + between
            case "two norms":
                result = result + self.other(between)
            case "convolution":
                result = self.conv(result)
            case "norm":
                result = self.norm(result)
            case "weight":
                result = result * self.conv.weight.sum()
            case "statistics":
                result = result - self.norm.running_mean.view(1, -1, 1, 1)
        return result


@pytest.mark.parametrize("how", ["output", "two norms", "convolution", "norm", "weight", "statistics", "shared norm"])
def test_what_is_used_twice_is_left_alone(how: str) -> None:
    check_folds(Twice(how), 0)


def test_the_same_module_used_once_folds() -> None:
    check_folds(Twice("not at all"), 1)


def test_weights_shared_by_two_convolutions_fold_for_each() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    check_folds(model, 2)


class Scaled(nn.Conv2d):
    """A convolution of twice its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, 2 * self.weight.clamp(-0.1, 0.1), self.bias)


class Shifted(nn.BatchNorm2d):
    """Looks like a batch norm, and does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean()


class Pooled(nn.BatchNorm2d):
    """On one value a channel it is a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(super().forward(x), 3, 1, 1)


REFUSED: dict[str, Callable[[nn.Sequential], object]] = {
    "norm in train mode": lambda model: model[1].train(),
    "norm without statistics": lambda model: put(model, 1, nn.BatchNorm2d(8, track_running_stats=False)),
    "hook on the convolution": lambda model: hooked(model[0]),
    "hook on the norm": lambda model: hooked(model[1]),
    "hook around the convolution": lambda model: put(model, 0, hooked(nn.Sequential(model[0]))),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[0]),
    "weight norm by a hook": lambda model: nn.utils.weight_norm(model[0]),
    "spectral norm by a hook": lambda model: nn.utils.spectral_norm(model[0]),
    "parametrized norm": lambda model: nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Tanh()),
    "another forward": lambda model: setattr(model[0], "forward", lambda x: x.repeat(1, 3, 1, 1)[:, :8]),
    "unknown convolution": lambda model: put(model, 0, Scaled(3, 8, 3)),
    "unknown norm": lambda model: put(model, 1, randomised(Shifted(8))),
    "norm that pools": lambda model: put(model, 1, randomised(Pooled(8))),
    "group norm": lambda model: put(model, 1, nn.GroupNorm(2, 8)),
    "layer between": lambda model: model.insert(1, nn.ReLU()),
}


def put(model: nn.Sequential, place: int, module: nn.Module) -> None:
    model[place] = module.double().eval()


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_folded_exactly_is_left_alone(what: str) -> None:
    model = randomised(pair())
    REFUSED[what](model)
    model.requires_grad_(False)
    layers, before = [type(layer) for layer in model], copy.deepcopy(model.state_dict())
    assert fold_batch_norms(model) == 0
    assert [type(layer) for layer in model] == layers
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(images()).isfinite().all()


@pytest.mark.parametrize("place", [0, 1])
def test_what_trains_is_left_alone(place: int) -> None:
    model = randomised(pair())
    model[place].requires_grad_(True)
    assert fold_batch_norms(model) == 0 and type(model[1]) is nn.BatchNorm2d


def test_a_subclass_that_only_pads_otherwise_folds_where_it_is_named() -> None:
    class Padded(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    model = randomised(nn.Sequential(Padded(3, 8, 3), nn.BatchNorm2d(8)))
    x, folded = images(), copy.deepcopy(model)
    assert fold_batch_norms(copy.deepcopy(model)) == 0
    assert fold_batch_norms(folded, (*CONVOLUTIONS, Padded)) == 1
    assert torch.allclose(model(x), folded(x), rtol=0, atol=1e-12)


class Asking(nn.Module):
    """Its way depends on the input: a norm for large images only, or an error."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.norm, self.how = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), how

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        if self.how == "assertion":
            assert x.shape[1] == 3
        between = self.conv(x)
        if self.how == "skipped" and x.shape[2] < 20:
            return between
        result = self.norm(between)
        if self.how == "pooled" and x.shape[2] > 20:
            result = F.max_pool2d(result, 2)
        if self.how == "second use" and x.shape[2] > 20:
            result = result + between
        if self.how == "loop":
            while result.sum() > 0:
                result = result - 1
        return result if scale is None else result + scale * between


@pytest.mark.parametrize(("how", "expected"), [("pooled", 1), ("assertion", 1), ("skipped", 0), ("second use", 0)])
def test_a_pair_folds_only_where_it_is_one_whatever_the_input(how: str, expected: int) -> None:
    folded = check_folds(Asking(how), expected)
    if how == "pooled":
        assert folded(images().repeat(1, 1, 3, 3)).shape == (2, 3, 13, 13)


@pytest.mark.parametrize("how", ["loop", "numbers"])
def test_a_network_that_cannot_be_traced_stays_as_it_is_and_the_log_says_so(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Reading(Asking):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(x.shape[2])

    model = randomised((Asking if how == "loop" else Reading)(how))
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.INFO):
        assert fold_batch_norms(model) == 0
    assert "cannot be traced" in caplog.text and "its batch norms stay as they are" in caplog.text
    assert type(model.norm) is nn.BatchNorm2d
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_a_forward_keeps_is_nothing_of_the_tracing() -> None:
    class Keeping(nn.Sequential):
        mean: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.mean is None:
                self.mean = x.mean()
            return super().forward(x) + self.mean

    assert isinstance(check_folds(Keeping(*pair()), 1).mean, Tensor)


@pytest.mark.parametrize("how", ["attribute", "list", "global", "norm's output"])
def test_what_a_forward_stores_before_the_norm_stays_as_it_is(how: str) -> None:
    outside: list[Tensor] = []

    class Storing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.features = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), []

        def forward(self, x: Tensor) -> Tensor:
            before = self.conv(x)
            after = self.norm(before)
            match how:
                case "attribute":
                    self.feature = before
                case "list":
                    self.features.append(before)
                case "global":
                    outside.append(before)
                case _:
                    self.feature = after
            return after.relu()

    folded = check_folds(Storing(), 1 if how == "norm's output" else 0)
    if how == "attribute":
        x = images()
        folded(x)
        assert torch.equal(folded.feature, folded.conv(x))
