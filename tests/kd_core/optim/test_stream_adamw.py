"""StreamAdamW beside a slow reference written from its docstring, and beside `torch.optim.AdamW`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_core.optim import StreamAdamW
from kd_core.streams import backward_streams

THREE = {"tog": 0.9, "tcg": 0.8, "ncg": 0.95}
PAIR = {"tog": 0.95, "tcg": 0.8, "ncg": 0.95}


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def streams(model: nn.Module, seed: int) -> dict[str, Tensor]:
    outputs = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return {"tog": outputs.square().mean(), "tcg": outputs[:, 0].mean(), "ncg": outputs.exp().mean()}


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02, "weight_decay": 0.1}]


def reference(model: nn.Sequential, momenta: dict[str, float], steps: int) -> None:
    """The docstring's formulas, one parameter and one stream at a time."""
    first = {(s, p): torch.zeros_like(p) for s in momenta for p in model.parameters()}
    second = {p: torch.zeros_like(p) for p in model.parameters()}
    for t in range(1, steps + 1):
        losses = streams(model, t)
        g = {s: torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for s, loss in losses.items()}
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                lr, decay = (0.01, 0.01) if i < 2 else (0.02, 0.1)
                p -= lr * decay * p
                second[p] = 0.999 * second[p] + 0.001 * sum(g[s][i] for s in momenta) ** 2
                root = (second[p] / (1 - 0.999**t)).sqrt() + 1e-8
                for s, b in momenta.items():
                    first[s, p] = b * first[s, p] + (1 - b) * g[s][i]
                    p -= lr * first[s, p] / (1 - b**t) / root


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        backward_streams(streams(model, t), optimizer)
        optimizer.step()


def assert_equal(model: nn.Module, other: nn.Module, tolerance: float) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("momenta", [THREE, PAIR])
def test_it_is_its_docstring_over_a_hundred_steps(momenta: dict[str, float]) -> None:
    model, other = net(), net()
    train(StreamAdamW(groups(model), 0.01, momenta), model, 100)
    reference(other, momenta, 100)
    assert_equal(model, other, 1e-12)


@pytest.mark.parametrize("momenta", [{"tog": 0.9, "tcg": 0.9, "ncg": 0.9}])
def test_equal_momenta_are_torch_adamw_on_the_summed_loss(momenta: dict[str, float]) -> None:
    model, other = net(), net()
    train(StreamAdamW(groups(model), 0.01, momenta), model, 100)
    train(torch.optim.AdamW(groups(other), 0.01, betas=(0.9, 0.999), weight_decay=0.01), other, 100)
    assert_equal(model, other, 1e-12)


def test_one_second_moment_serves_all_streams() -> None:
    model = net()
    optimizer = StreamAdamW(model.parameters(), 0.01, THREE)
    train(optimizer, model, 2)
    state = optimizer.state[model[0].weight]
    assert set(state) == {"step", "exp_avg_sq", "momentum_buffers"}
    assert list(state["momentum_buffers"]) == ["tog", "tcg", "ncg"]


def test_a_parameter_that_joins_late_has_its_own_bias_correction() -> None:
    late, alone = nn.Parameter(torch.ones(2).double()), nn.Parameter(torch.ones(2).double())
    early = nn.Parameter(torch.ones(2).double())
    optimizer, other = StreamAdamW([early, late], 0.01, THREE), StreamAdamW([alone], 0.01, THREE)
    for t in range(6):
        optimizer.zero_grad()
        other.zero_grad()
        backward_streams({"tog": early.sum() + (late.square().sum() if t > 2 else 0)}, optimizer)
        backward_streams({"tog": alone.square().sum() if t > 2 else None}, other)
        optimizer.step()
        other.step()
    assert torch.equal(late, alone)


def test_a_set_that_never_reached_a_parameter_costs_no_buffer_there() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = StreamAdamW([p], 0.01, THREE)
    backward_streams({"tog": p.sum()}, optimizer)
    optimizer.step()
    assert list(optimizer.state[p]["momentum_buffers"]) == ["tog"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0: it must be ≥ 0"),
        ({"beta2": 1.0}, r"beta2 is 1.0: it must be in \[0, 1\)"),
        ({"eps": 0.0}, "eps is 0.0: it must be > 0"),
        ({"momenta": {}}, "momenta is empty"),
        ({"momenta": {"tog": 1.0}}, "the momentum of stream 'tog' is 1.0"),
    ],
)
def test_a_value_out_of_its_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamAdamW([nn.Parameter(torch.zeros(1))], **{"lr": 0.1, "momenta": THREE, **arguments})
