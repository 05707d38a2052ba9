"""`backward_streams`: how many passes, what `p.grad` shows, what is refused."""

import pytest
import torch
from torch import Tensor, nn

from kd_core.losses import DKDLoss, GDKDLoss
from kd_core.optim import StreamAdamW, StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams, stream_sets, to_streams
from kd_core.streams.gradients import CHANGED

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


def edit_by_numpy(model: nn.Module) -> None:
    next(model.parameters()).grad.numpy()[0, 0] += 1e-9


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-3),
        lambda model: next(model.parameters()).grad.add_(1),
        lambda model: next(model.parameters()).grad.mul_(0.5),
        lambda model: setattr(next(model.parameters()), "grad", None),
        lambda model: setattr(next(model.parameters()), "grad", torch.zeros(9, 6).double()),
        lambda model: setattr(next(model.parameters()), "grad", next(model.parameters()).grad.clone()),
        lambda model: sum(dkd_streams(model, seed=1).values()).backward(),
        lambda model: [p.grad.data.clamp_(-1e-3, 1e-3) for p in model.parameters()],
        lambda model: next(model.parameters()).grad.data.neg_(),
        lambda model: next(model.parameters()).grad.detach().zero_(),
        edit_by_numpy,
    ],
    ids=[
        "clip by value",
        "in place",
        "a factor for one parameter only",
        "None",
        "another tensor",
        "an equal tensor",
        "plain backward",
        "data.clamp_",
        "data.neg_ of one parameter",
        "detach",
        "numpy",
    ],
)
def test_changing_p_grad_is_an_error_where_several_momenta_would_ignore_it(change) -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    backward_streams(dkd_streams(model), optimizer)
    change(model)
    for use in (optimizer.step, lambda: optimizer.clip_grad_norm_(1), lambda: backward_streams({}, optimizer)):
        with pytest.raises(
            RuntimeError, match=r"p\.grad was changed outside backward_streams.*clip_grad_norm_ to clip"
        ):
            use()
    optimizer.zero_grad()
    backward_streams(dkd_streams(model), optimizer)
    optimizer.step()


def test_the_message_is_short_enough_for_an_assertion_on_a_gpu() -> None:
    assert len(CHANGED) < 255  # torch._assert_async refuses more: every step under a float16 scaler failed on CUDA


def test_a_gradient_that_one_stream_alone_reaches_is_guarded_as_well() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = deepkd_sgd([p, q], lr=0.1)
    backward_streams({"tog": (p + q).sum(), "tcg": p.square().sum()}, optimizer)
    q.grad.data.clamp_(max=0.5)
    with pytest.raises(RuntimeError, match=r"p\.grad was changed"):
        optimizer.step()


def rescale(model: nn.Module, factor: float) -> None:
    for p in model.parameters():
        p.grad.mul_(factor)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 0.05, foreach=False),
        lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1e9),
        lambda model: rescale(model, 3.7),
        lambda model: rescale(model, -0.1),
        lambda model: rescale(model, 1.0),
        lambda model: [p.grad.data.mul_(0.3) for p in model.parameters()],
        lambda model: [p.grad.numpy() for p in model.parameters()],
        lambda model: model.zero_grad(set_to_none=False),
    ],
    ids=["clip", "clip, not foreach", "clip to more", "3.7", "-0.1", "1", "data", "read by numpy", "zeroed in place"],
)
@pytest.mark.parametrize("momenta", [(0.975, 0.825, 0.975), (0.9, 0.8, 0.95)], ids=["two sets", "three sets"])
def test_one_factor_on_all_of_p_grad_is_followed_by_every_stream(change, momenta: tuple[float, ...]) -> None:
    """Beside three SGDs, each with its momentum and a gradient of its own that is scaled by the same factor."""
    model, slow = small_net(), small_net()
    optimizer = StreamSGD(model.parameters(), 0.1, dict(zip(STREAMS, momenta, strict=True)))
    velocity = {stream: [torch.zeros_like(p) for p in slow.parameters()] for stream in STREAMS}
    for step in range(4):
        optimizer.zero_grad()
        backward_streams(dkd_streams(model, step), optimizer)
        before = model[0].weight.grad.clone()
        change(model)
        factor = model[0].weight.grad[0, 0] / before[0, 0]
        losses = dkd_streams(slow, step)
        for stream, momentum in zip(STREAMS, momenta, strict=True):
            gradients = torch.autograd.grad(losses[stream], list(slow.parameters()), retain_graph=True)
            velocity[stream] = [momentum * v + factor * g for v, g in zip(velocity[stream], gradients, strict=True)]
        optimizer.step()
        with torch.no_grad():
            for p, *moves in zip(slow.parameters(), *velocity.values(), strict=True):
                p -= 0.1 * sum(moves)
    for p, q in zip(model.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_factors_in_a_row_are_recognised_where_one_element_is_the_largest_by_far(dtype: torch.dtype) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        p = nn.Parameter(torch.zeros(20_000, dtype=dtype))
        optimizer = deepkd_sgd([p], lr=0.1)
        noise = torch.randn(2, 20_000, dtype=dtype)
        noise[0, 0] = 1e4 * (1 + seed / 7)
        backward_streams({"tog": (p * noise[0]).sum(), "tcg": (p * noise[1]).sum()}, optimizer)
        for max_norm in (300.0, 7.0, 1.0):
            nn.utils.clip_grad_norm_([p], max_norm)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_clipping_by_torch_is_recognised_in_every_type(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300, 20).to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]
    optimizer = deepkd_sgd(params, lr=1.0)
    for max_norm in (0.3, 1e-4, 123.4):
        optimizer.zero_grad()
        noise = [torch.randn_like(p) for p in params]
        losses = {"tog": sum((p * n).mean() for p, n in zip(params, noise, strict=True)), "tcg": params[0].mean()}
        backward_streams(losses, optimizer)
        nn.utils.clip_grad_norm_(params, max_norm)
        optimizer.step()
        params[0].grad.data[3, 3] += params[0].grad.abs().max()
        with pytest.raises(RuntimeError, match=r"p\.grad was changed"):
            optimizer.step()


def test_micro_batches_after_a_common_factor_add_to_the_scaled_streams() -> None:
    model, other = small_net(), small_net()
    optimizers = [deepkd_sgd(m.parameters(), lr=0.1) for m in (model, other)]
    backward_streams(dkd_streams(model), optimizers[0])
    rescale(model, 0.5)
    backward_streams(dkd_streams(model, 1), optimizers[0])
    backward_streams({name: loss / 2 for name, loss in dkd_streams(other).items()}, optimizers[1])
    backward_streams(dkd_streams(other, 1), optimizers[1])
    for m, optimizer in zip((model, other), optimizers, strict=True):
        nn.utils.clip_grad_norm_(m.parameters(), 0.1)
        optimizer.clip_grad_norm_(0.05)
        optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def test_a_step_in_which_nothing_requires_a_gradient_is_said() -> None:
    model = small_net().requires_grad_(False)
    head = nn.Parameter(torch.zeros(1))
    for optimizer in (deepkd_sgd([head, *model.parameters()], lr=0.1), torch.optim.SGD([head], 0.1)):
        with pytest.warns(RuntimeWarning, match="no loss reaches a parameter of the optimizer.*check requires_grad"):
            backward_streams(dkd_streams(model), optimizer)


def test_a_micro_batch_in_which_nothing_requires_a_gradient_is_no_matter(recwarn: pytest.WarningsRecorder) -> None:
    model = small_net()
    optimizer = deepkd_sgd(model.parameters(), lr=0.1)
    backward_streams({}, optimizer, sync=False)
    backward_streams(dkd_streams(model), optimizer, sync=False)
    backward_streams({"tog": torch.zeros(())}, optimizer)
    assert not [w for w in recwarn if "backward_streams" in str(w.message)]


@pytest.mark.parametrize("build", [deepkd_sgd, lambda p, lr: StreamAdamW(p, lr, {"tog": 0.9, "tcg": 0.8, "ncg": 0.9})])
def test_bfloat16_parameters_may_have_float32_gradients(build) -> None:
    """The streams then add up in float32, and the update is made in the parameter's own type."""
    torch.manual_seed(0)
    start = torch.randn(40)
    params = [nn.Parameter(start.bfloat16()) for _ in range(2)]
    params[0].grad_dtype = torch.float32
    for p in params:
        optimizer = build([p], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            backward_streams({"tog": (p - 1).square().sum(), "tcg": p.abs().sum(), "ncg": p.exp().sum()}, optimizer)
            assert p.grad.dtype == (torch.float32 if p is params[0] else torch.bfloat16)
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
        assert all(b.dtype == torch.bfloat16 for b in optimizer.state[p]["momentum_buffers"].values())
    assert not torch.equal(params[0], start.bfloat16())
    torch.testing.assert_close(*params, rtol=0.02, atol=0.02)


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


def test_the_streams_of_a_parameter_that_two_of_three_sets_reach_add_up() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = StreamSGD([p, q], 0.1, {"tog": 0.9, "tcg": 0.8, "ncg": 0.95})
    backward_streams({"tog": p.sum(), "tcg": 2 * (p + q).sum(), "ncg": 4 * (p + q).sum()}, optimizer)
    assert (p.grad.tolist(), q.grad.tolist()) == ([7, 7], [6, 6])


def test_terms_are_summed_by_stream() -> None:
    loss, one = GDKDLoss(k=2), torch.ones((), requires_grad=True)
    terms = {term: one * 2**i for i, term in enumerate(loss.streams)}
    streams = to_streams(terms, loss, task_loss=one * 100)
    expected = {stream: sum(terms[t] for t in terms if loss.streams[t] == stream) for stream in loss.streams.values()}
    assert {stream: float(value) for stream, value in streams.items()} == {
        "tog": 100,
        **{stream: float(value) for stream, value in expected.items()},
    }
    assert "tog" not in to_streams(terms, loss)


def test_a_term_that_no_stream_names_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unknown term 'tckdd': DKDLoss\.streams names tckd, nckd"):
        to_streams({"tckdd": torch.ones(())}, DKDLoss())
