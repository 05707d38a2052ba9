"""fp16's GradScaler with several streams: all of them scaled, all of them unscaled, one infinity stops all."""

import pytest
import torch
from torch import Tensor, nn

from kd_core.optim import StreamAdamW, StreamOptimizer, StreamSGD
from kd_core.streams import backward_streams

MOMENTA = {
    "one set": {"tog": 0.9, "tcg": 0.9, "ncg": 0.9},
    "two sets": {"tog": 0.975, "tcg": 0.825, "ncg": 0.975},
    "three sets": {"tog": 0.9, "tcg": 0.8, "ncg": 0.95},
}
OPTIMIZERS = {
    "sgd": lambda params, momenta: StreamSGD(params, 0.01, momenta, weight_decay=0.1),
    "adamw": lambda params, momenta: StreamAdamW(params, 0.01, momenta),
}


@pytest.fixture(params=MOMENTA)
def momenta(request: pytest.FixtureRequest) -> dict[str, float]:
    return MOMENTA[request.param]


@pytest.fixture(params=OPTIMIZERS)
def build(request: pytest.FixtureRequest):
    return OPTIMIZERS[request.param]


def net() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def streams(model: nn.Module, seed: int) -> dict[str, Tensor]:
    outputs = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)))
    # The first layer's bias is reached by tog alone, as an RPN is.
    return {
        "tog": outputs.square().mean() + model[0].bias.sum(),
        "tcg": outputs[:, 0].mean(),
        "ncg": outputs.exp().mean(),
    }


def cpu_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=10_000)


def train(build, momenta: dict[str, float], use_scaler: bool, clip: str = "") -> tuple[nn.Module, StreamOptimizer]:
    """Six steps of two micro-batches. `clip`: "", "clip", or "unscale, clip", as PyTorch's recipe has it."""
    model = net()
    optimizer, scaler = build(model.parameters(), momenta), cpu_scaler() if use_scaler else None
    for step in range(6):
        optimizer.zero_grad()
        for micro_batch in range(2):
            backward_streams(streams(model, 2 * step + micro_batch), optimizer, scaler=scaler)
        if scaler is not None and "unscale" in clip:
            scaler.unscale_(optimizer)
        if clip:
            optimizer.clip_grad_norm_(0.5)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return model, optimizer


@pytest.mark.parametrize("clip", ["", "clip", "unscale, clip"])
def test_scaling_and_unscaling_leave_the_training_as_it_is(build, momenta: dict[str, float], clip: str) -> None:
    scaled, scaled_optimizer = train(build, momenta, use_scaler=True, clip=clip)
    plain, _ = train(build, momenta, use_scaler=False, clip=clip)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    assert len(scaled_optimizer.state) == 4


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stream", ["tog", "tcg", "ncg"])
@pytest.mark.parametrize("clip", [False, True])
def test_an_infinity_in_one_stream_skips_the_step_for_all_and_halves_the_scale(
    build, momenta: dict[str, float], stream: str, bad: float, clip: bool
) -> None:
    model = net()
    optimizer, scaler = build(model.parameters(), momenta), cpu_scaler()
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        state = [t.clone() for t in buffers(optimizer)]
        losses = streams(model, step)
        if step == 1:
            losses[stream] = losses[stream] * bad
        optimizer.zero_grad()
        backward_streams(losses, optimizer, scaler=scaler)
        if clip:
            optimizer.clip_grad_norm_(0.5)
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
        assert moved == [step != 1] * 4
        if step == 1:
            assert all(torch.equal(t, u) for t, u in zip(buffers(optimizer), state, strict=True))
    assert scaler.get_scale() == 2.0**9


def buffers(optimizer: StreamOptimizer) -> list[Tensor]:
    return [b for state in optimizer.state.values() for b in state.get("momentum_buffers", {}).values()]


def test_layouts_without_a_fused_kernel_skip_too() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    optimizer, scaler = StreamSGD(model.parameters(), 0.1, MOMENTA["two sets"]), cpu_scaler()
    for bad in (1.0, float("inf")):
        outputs = model(torch.ones(1, 3, 5, 5))
        backward_streams({"tog": outputs.sum() * bad, "tcg": outputs.square().sum()}, optimizer, scaler=scaler)
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[0].weight, before) == (bad != 1)
        optimizer.zero_grad()
        model.to(memory_format=torch.channels_last)  # the buffers stay contiguous


def test_scaled_gradients_are_not_stepped_without_the_scaler(momenta: dict[str, float]) -> None:
    model = net()
    optimizer = StreamSGD(model.parameters(), 0.1, momenta)
    backward_streams(streams(model, 0), optimizer, scaler=cpu_scaler())
    with pytest.raises(RuntimeError, match=r"the gradients are scaled: step by scaler\.step\(optimizer\)"):
        optimizer.step()


@pytest.mark.parametrize("recipe", ["step", "unscale, clip, step"])
def test_a_scaler_that_backward_streams_has_not_been_given_is_refused(
    build, momenta: dict[str, float], recipe: str
) -> None:
    """As under fp16 in accelerate, the HF Trainer and Lightning, which step by a scaler of their own."""
    model = net()
    optimizer, scaler = build(model.parameters(), momenta), cpu_scaler()
    scaler.scale(torch.ones(()))  # as the framework's: it has a scale
    backward_streams(streams(model, 0), optimizer)
    if "clip" in recipe:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match=r"divide gradients that it has not multiplied: pass it as scaler="):
        scaler.step(optimizer)


def test_a_step_without_any_gradient_does_nothing_under_a_scaler(build, momenta: dict[str, float]) -> None:
    model = net()
    optimizer, scaler = build(model.parameters(), momenta), cpu_scaler()
    with pytest.warns(RuntimeWarning, match="no loss reaches a parameter"):
        backward_streams({"tog": torch.zeros(())}, optimizer, scaler=scaler)
    optimizer.found_inf, optimizer.grad_scale = 0, torch.ones(())  # what GradScaler.step hands over then
    optimizer.step()
    assert all(map(torch.equal, model.parameters(), net().parameters()))


def test_micro_batches_after_clipping_or_without_the_scaler_are_refused(momenta: dict[str, float]) -> None:
    model = net()
    optimizer, scaler = StreamSGD(model.parameters(), 0.1, momenta), cpu_scaler()
    backward_streams(streams(model, 0), optimizer, scaler=scaler)
    with pytest.raises(RuntimeError, match="micro-batches of one step are all scaled or none"):
        backward_streams(streams(model, 1), optimizer)
    optimizer.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="clip and unscale after the last"):
        backward_streams(streams(model, 1), optimizer, scaler=scaler)


def test_a_disabled_scaler_is_none(momenta: dict[str, float]) -> None:
    model = net()
    optimizer, scaler = StreamSGD(model.parameters(), 0.1, momenta), torch.amp.GradScaler("cpu", enabled=False)
    backward_streams(streams(model, 0), optimizer, scaler=scaler)
    optimizer.clip_grad_norm_(1.0)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model[0].weight, net()[0].weight)


@pytest.mark.parametrize("unscale", [False, True])
def test_changing_p_grad_is_an_error_under_a_scaler_too(unscale: bool) -> None:
    for change in (
        lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e-6),
        lambda model: model[0].weight.grad.data.clamp_(max=0),
    ):
        model = net()
        optimizer, scaler = StreamSGD(model.parameters(), 0.1, MOMENTA["two sets"]), cpu_scaler()
        backward_streams(streams(model, 0), optimizer, scaler=scaler)
        if unscale:
            scaler.unscale_(optimizer)
        change(model)
        with pytest.raises(RuntimeError, match=r"p\.grad was changed outside backward_streams"):
            scaler.step(optimizer)


@pytest.mark.parametrize("init_scale", [2.0**10, 1000.0])
def test_clipping_by_torch_after_unscaling_is_clipping_by_the_optimizer(
    build, momenta: dict[str, float], init_scale: float
) -> None:
    models = net(), net()
    for model, by_torch in zip(models, (True, False), strict=True):
        optimizer = build(model.parameters(), momenta)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        for step in range(5):
            optimizer.zero_grad()
            losses = streams(model, step)
            if step == 2:
                losses["tcg"] = losses["tcg"] * float("inf")
            backward_streams(losses, optimizer, scaler=scaler)
            if by_torch:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            else:
                optimizer.clip_grad_norm_(0.5)
            scaler.step(optimizer)
            scaler.update()
    assert not torch.equal(models[0][0].weight, net()[0].weight)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradients_zeroed_in_place_take_the_next_scaled_backward_pass(build, momenta: dict[str, float]) -> None:
    models = net(), net()
    for model, set_to_none in zip(models, (True, False), strict=True):
        optimizer, scaler = build(model.parameters(), momenta), cpu_scaler()
        for step in range(4):
            optimizer.zero_grad(set_to_none=set_to_none)
            backward_streams(streams(model, step), optimizer, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("init_scale", [1024.0, 2.0**127], ids=["", "infinite at first"])
def test_gradients_that_the_model_zeroes_in_place_take_the_next_scaled_backward_pass(
    build, momenta: dict[str, float], init_scale: float
) -> None:
    models = net(), net()
    for model, set_to_none in zip(models, (True, False), strict=True):
        optimizer, scaler = build(model.parameters(), momenta), torch.amp.GradScaler("cpu", init_scale=init_scale)
        for step in range(12):
            losses = {stream: 8 * loss for stream, loss in streams(model, step).items()}
            backward_streams(losses, optimizer, scaler=scaler)
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad(set_to_none=set_to_none)
    assert scaler.get_scale() == 1024 or 1024 < scaler.get_scale() < 2.0**127
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_plain_backward_with_one_stream_works_with_a_scaler_as_in_torch() -> None:
    model, plain = net(), net()
    optimizers = [StreamSGD(model.parameters(), 0.1, {"tog": 0.9}), torch.optim.SGD(plain.parameters(), 0.1, 0.9)]
    for each, optimizer in zip((model, plain), optimizers, strict=True):
        scaler = cpu_scaler()
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(sum(streams(each, step).values())).backward()
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_autocast_with_the_scaler_trains() -> None:
    model = net()
    optimizer, scaler = StreamSGD(model.parameters(), 0.05, MOMENTA["two sets"]), cpu_scaler()
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            losses = {"tog": (model(torch.ones(2, 4)).float() - 1).square().mean()}
        first = first or losses["tog"].item()
        backward_streams(losses, optimizer, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert losses["tog"].item() < 0.1 * first
