"""`backward_streams`: how many passes, what `p.grad` shows, what is refused."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from kd_core.losses import DKDLoss
from kd_core.optim import StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams, stream_sets

STREAMS = ("tog", "tcg", "ncg")


def small_net() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def dkd_streams(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    teacher_logits = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (8,), generator=generator)
    logits = model(inputs)
    terms = DKDLoss()(logits, teacher_logits, target)
    return {"tog": nn.functional.cross_entropy(logits, target), "tcg": terms["tckd"], "ncg": terms["nckd"]}


def count_backward_passes(model: nn.Module) -> list[int]:
    """A list that grows by one with every backward pass through the model's last layer."""
    passes: list[int] = []
    model[-1].register_full_backward_hook(lambda *_: passes.append(1))
    return passes


def test_the_papers_deepkd_takes_two_backward_passes() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    passes = count_backward_passes(model)
    backward_streams(dkd_streams(model), optimizer)
    assert optimizer.stream_sets == (("tog", "ncg"), ("tcg",))
    assert len(passes) == 2


@pytest.mark.parametrize(("momenta", "expected"), [((0.9, 0.9, 0.9), 1), ((0.9, 0.8, 0.95), 3), ((0.8, 0.9, 0.9), 2)])
def test_a_set_of_equal_momenta_costs_one_backward_pass(momenta: tuple[float, ...], expected: int) -> None:
    model = small_net()
    passes = count_backward_passes(model)
    optimizer = StreamSGD(model.parameters(), 0.1, dict(zip(STREAMS, momenta, strict=True)))
    backward_streams(dkd_streams(model), optimizer)
    assert len(passes) == expected


def test_momenta_that_differ_by_rounding_are_equal() -> None:
    assert 0.9 + 0.05 != 0.95
    assert stream_sets([{"tog": 0.9 + 0.05, "tcg": 0.85, "ncg": 0.95}]) == (("tog", "ncg"), ("tcg",))


def test_the_sets_hold_in_every_parameter_group() -> None:
    first = {"tog": 0.9, "tcg": 0.8, "ncg": 0.9}
    second = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}
    third = {"tog": 0.9, "tcg": 0.8, "ncg": 0.8}
    assert stream_sets([first, second]) == (("tog", "ncg"), ("tcg",))
    assert stream_sets([first, second, third]) == (("tog",), ("tcg",), ("ncg",))


@pytest.mark.parametrize("momenta", [(0.975, 0.825, 0.975), (0.9, 0.8, 0.95), (0.9, 0.9, 0.9)])
def test_p_grad_shows_the_sum_of_all_streams(momenta: tuple[float, ...]) -> None:
    model, plain = small_net(), small_net()
    optimizer = StreamSGD(model.parameters(), 0.1, dict(zip(STREAMS, momenta, strict=True)))
    for micro_batch in range(3):
        backward_streams(dkd_streams(model, micro_batch), optimizer)
        sum(dkd_streams(plain, micro_batch).values()).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_a_stream_that_is_absent_none_or_without_a_graph_reaches_nothing() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    passes = count_backward_passes(model)
    backward_streams({"tog": dkd_streams(model)["tog"], "tcg": None}, optimizer)
    backward_streams({"tog": torch.zeros(()), "ncg": torch.zeros(())}, optimizer)
    backward_streams({}, optimizer)
    assert len(passes) == 1
    assert not optimizer.gradients.of_set[1]


def test_only_the_last_pass_frees_the_graph() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    losses = dkd_streams(model)
    backward_streams(losses, optimizer, retain_graph=True)
    backward_streams(losses, optimizer)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        backward_streams(losses, optimizer)


def test_a_backward_pass_that_fails_leaves_no_half_of_a_gradient() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    losses = dkd_streams(model)
    losses["tcg"].backward(retain_graph=False)
    model.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        backward_streams(losses, optimizer)
    assert all(p.grad is None for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_any_torch_optimizer_takes_all_streams_as_one_set() -> None:
    model, plain = small_net(), small_net()
    passes = count_backward_passes(model)
    backward_streams(dkd_streams(model), torch.optim.AdamW(model.parameters()))
    sum(dkd_streams(plain).values()).backward()
    assert len(passes) == 1
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14)


def test_an_unknown_stream_is_named_with_those_there_are() -> None:
    optimizer = deepkd_sgd(small_net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="unknown stream 'ncd': the optimizer's momenta name tog, ncg, tcg"):
        backward_streams({"ncd": torch.zeros(())}, optimizer)


def test_a_loss_that_is_no_scalar_tensor_is_refused() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"stream 'tog' has shape \(4,\): give its mean or its sum"):
        backward_streams({"tog": model(torch.zeros(4, 6).double()).sum(1)}, optimizer)
    with pytest.raises(ValueError, match=r"stream 'tcg' is 0.5: give a scalar tensor, or None"):
        backward_streams({"tcg": 0.5}, optimizer)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e-3),
        lambda model: next(model.parameters()).grad.add_(1),
        lambda model: setattr(next(model.parameters()), "grad", None),
        lambda model: setattr(next(model.parameters()), "grad", torch.zeros(9, 6).double()),
        lambda model: sum(dkd_streams(model).values()).backward(),
        lambda model: model.zero_grad(set_to_none=False),
    ],
    ids=["clip by value", "clip by norm", "in place", "None", "another tensor", "plain backward", "zeroed in place"],
)
def test_changing_p_grad_is_an_error_where_several_momenta_would_ignore_it(change) -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    backward_streams(dkd_streams(model), optimizer)
    change(model)
    for use in (optimizer.step, lambda: optimizer.clip_grad_norm_(1), lambda: backward_streams({}, optimizer)):
        with pytest.raises(RuntimeError, match=r"p\.grad was changed outside backward_streams"):
            use()
    optimizer.zero_grad()
    backward_streams(dkd_streams(model), optimizer)
    optimizer.step()


def test_a_plain_backward_pass_is_refused_with_several_momenta() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    sum(dkd_streams(model).values()).backward()
    with pytest.raises(RuntimeError, match=r"backward_streams for loss\.backward"):
        optimizer.step()


def test_model_zero_grad_drops_the_streams_too() -> None:
    model, other = small_net(), small_net()
    optimizers = [deepkd_sgd(m.parameters(), lr=0.1) for m in (model, other)]
    backward_streams(dkd_streams(model, seed=7), optimizers[0])
    model.zero_grad()
    for m, optimizer in zip((model, other), optimizers, strict=True):
        backward_streams(dkd_streams(m), optimizer)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_momenta_may_not_change_between_backward_and_step() -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    backward_streams(dkd_streams(model), optimizer)
    optimizer.set_momenta({"tog": 0.9, "tcg": 0.8, "ncg": 0.95})
    with pytest.raises(RuntimeError, match="momenta changed between backward_streams and step"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = deepkd_sgd(embedding.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="sparse gradients have no streams"):
        backward_streams({"tog": embedding(torch.tensor([1])).sum()}, optimizer)


def test_activation_checkpointing_works_in_both_forms() -> None:
    for reentrant in (True, False):
        model, plain = small_net(), small_net()
        inputs = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        outputs = torch.utils.checkpoint.checkpoint(model, inputs, use_reentrant=reentrant)
        backward_streams({"tog": outputs.sum(), "tcg": outputs.square().sum()}, deepkd_sgd(model.parameters(), lr=0.1))
        (plain(inputs).sum() + plain(inputs).square().sum()).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_frozen_parameters_are_left_alone() -> None:
    model = small_net()
    model[0].requires_grad_(False)
    before = model[0].weight.detach().clone()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1, weight_decay=0.5)
    backward_streams(dkd_streams(model), optimizer)
    optimizer.clip_grad_norm_(0.1)
    optimizer.step()
    assert model[0].weight.grad is None
    assert torch.equal(model[0].weight, before)


USED_AGAIN = """
import torch
from kd_core.optim import deepkd_sgd
from kd_core.streams import backward_streams

model = torch.nn.Linear(8, 4)
optimizer = deepkd_sgd(model.parameters(), lr=0.1)
addresses = []
for _ in range(2):
    optimizer.zero_grad()
    out = model(torch.randn(3, 8))
    backward_streams({"tog": out.square().mean(), "tcg": out.mean(), "ncg": out.abs().mean()}, optimizer)
    addresses.append(model.weight.grad.data_ptr())
print(addresses[0] == addresses[1])
"""


def test_the_memory_of_the_sum_is_used_again_unless_somebody_holds_it() -> None:
    def used_again(hold) -> bool:
        model = small_net()
        optimizer = deepkd_sgd(model.parameters(), lr=0.1)
        backward_streams(dkd_streams(model), optimizer)
        held = hold(model[0].weight.grad)
        kept, address = None if held is None else held.clone(), model[0].weight.grad.data_ptr()
        optimizer.zero_grad()
        backward_streams(dkd_streams(model, seed=1), optimizer)
        assert held is None or torch.equal(held, kept)
        return model[0].weight.grad.data_ptr() == address

    # In a process of its own: what ran before in this one (compilers, debuggers) may keep references of theirs.
    done = subprocess.run([sys.executable, "-c", USED_AGAIN], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
    for hold in (lambda grad: grad, lambda grad: grad[0], lambda grad: grad.detach(), lambda grad: grad.view(-1)):
        assert not used_again(hold)


def test_the_streams_of_a_parameter_that_two_of_three_sets_reach_add_up() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = StreamSGD([p, q], 0.1, {"tog": 0.9, "tcg": 0.8, "ncg": 0.95})
    backward_streams({"tog": p.sum(), "tcg": 2 * (p + q).sum(), "ncg": 4 * (p + q).sum()}, optimizer)
    assert (p.grad.tolist(), q.grad.tolist()) == ([7, 7], [6, 6])
