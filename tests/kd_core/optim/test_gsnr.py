"""GSNR against gradients of known mean and variance, and the momenta that follow from it."""

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from kd_core.optim import StreamSGD
from kd_core.optim.gsnr import AutoMomenta, GradientSNR, next_prime, suggest_momenta
from kd_core.streams import backward_streams

EQUAL = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}


def known_gradients(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A mean and a standard deviation for every parameter."""
    generator = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(size, generator=generator), 0.5 + torch.rand(size, generator=generator)


def measure(gsnr: GradientSNR, params: dict[str, Tensor], samples: int, stream: str = "tog") -> float:
    """Feeds gradients of known distribution; returns the closed form Σ μ² / Σ σ²."""
    known = {name: known_gradients(p.numel(), seed) for seed, (name, p) in enumerate(params.items())}
    for _ in range(samples):
        loss = sum((p * (known[name][0] + known[name][1] * torch.randn(p.numel()))).sum() for name, p in params.items())
        gsnr.update({stream: loss})
    signal = sum(mean.square().sum() for mean, _ in known.values())
    return (signal / sum(deviation.square().sum() for _, deviation in known.values())).item()


def test_it_is_the_closed_form_within_three_per_cent() -> None:
    params = {"a": nn.Parameter(torch.zeros(15_000)), "b": nn.Parameter(torch.zeros(5_000))}
    gsnr = GradientSNR(params.items(), ["tog"])
    expected = measure(gsnr, params, samples=2000)
    assert gsnr.overall()["tog"] == pytest.approx(expected, rel=0.03)
    for name, seed in (("a", 0), ("b", 1)):
        mean, deviation = known_gradients(params[name].numel(), seed)
        by_layer = (mean.square().sum() / deviation.square().sum()).item()
        assert gsnr.per_layer()["tog"][name] == pytest.approx(by_layer, rel=0.03)


def test_noise_alone_has_no_signal_because_the_means_own_variance_is_taken_off() -> None:
    p = nn.Parameter(torch.zeros(20_000))
    gsnr = GradientSNR([("p", p)], ["tog"])
    for _ in range(5):
        gsnr.update({"tog": (p * torch.randn(20_000)).sum()})
    assert abs(gsnr.overall()["tog"]) < 0.01  # ḡ² alone would say 0.2


def test_the_running_moments_are_those_of_all_samples_at_once() -> None:
    p = nn.Parameter(torch.zeros(50, dtype=torch.float64))
    gsnr = GradientSNR([("p", p)], ["tog"])
    gradients = torch.randn(9, 50, dtype=torch.float64) + 3
    for g in gradients:
        gsnr.update({"tog": (p * g).sum()})
    variance = gradients.var(0)
    expected = (gradients.mean(0).square() - variance / 9).sum() / variance.sum()
    assert gsnr.overall()["tog"] == pytest.approx(expected.item(), rel=1e-12)


def test_a_share_of_each_tensor_tells_the_same_with_less_memory() -> None:
    params = {"a": nn.Parameter(torch.zeros(100_000)), "b": nn.Parameter(torch.zeros(3))}
    full, tenth = GradientSNR(params.items(), ["tog"]), GradientSNR(params.items(), ["tog"], sample=0.1)
    torch.manual_seed(1)
    expected = measure(full, params, samples=60)
    torch.manual_seed(1)
    measure(tenth, params, samples=60)
    assert full.overall()["tog"] == pytest.approx(expected, rel=0.05)
    assert tenth.overall()["tog"] == pytest.approx(expected, rel=0.15)
    sizes = [t.numel() for t in tenth.state_dict()["mean"]["tog"]]
    assert sizes[0] == pytest.approx(100_000 / 11, abs=1)  # every 11th: the next prime
    assert sizes[1] == 1


def test_the_sampling_stride_is_a_prime_and_meets_every_tap_of_a_kernel() -> None:
    assert [next_prime(x) for x in (1, 1.5, 2, 4, 10, 100)] == [1, 2, 2, 5, 11, 101]
    weight = nn.Parameter(torch.zeros(64, 32, 3, 3))
    gsnr = GradientSNR([("w", weight)], ["tog"], sample=1 / 9)
    taps = torch.arange(9).repeat(64 * 32)
    assert set(taps[gsnr._offsets[0] :: gsnr.stride].tolist()) == set(range(9))


def test_streams_are_measured_apart_and_nothing_else_is_touched() -> None:
    p, only_tog = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2))
    gsnr = GradientSNR([("p", p), ("only_tog", only_tog)], EQUAL, every=2)
    for iteration in range(6):
        losses = {"tog": (p * torch.randn(4)).sum() + only_tog.sum(), "tcg": (p * 2).sum(), "ncg": None}
        assert gsnr.observe(losses, iteration) == (iteration % 2 == 0)
        sum(loss for loss in losses.values() if loss is not None).backward()  # the graph is still there
        p.grad = only_tog.grad = None
    assert gsnr.count == {"tog": 3, "tcg": 3, "ncg": 0}
    assert gsnr.overall()["tcg"] == math.inf
    assert math.isnan(gsnr.overall()["ncg"])
    assert gsnr.per_layer()["tcg"] == {"p": math.inf, "only_tog": 0.0}


def test_a_loss_scale_is_divided_out_and_an_overflow_is_left_out() -> None:
    p = nn.Parameter(torch.zeros(100))
    plain, scaled = GradientSNR([("p", p)], ["tog"]), GradientSNR([("p", p)], ["tog"])
    for factor in (1.0, 2.0, float("inf"), 3.0):
        loss = (p * torch.linspace(1, 2, 100) * factor).sum()
        if factor < 9:
            plain.update({"tog": loss})
        scaled.update({"tog": loss}, scale=torch.tensor(1024.0))
    assert scaled.count == {"tog": 3}
    assert scaled.overall() == pytest.approx(plain.overall())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": 0}, r"sample is 0: it is a share of each tensor, in \(0, 1\]"),
        ({"sample": 1.5}, "sample is 1.5"),
        ({"every": 0}, "every is 0: it must be at least 1"),
        ({"named_parameters": []}, "no parameter that requires a gradient"),
    ],
)
def test_a_value_out_of_its_range_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientSNR(**{"named_parameters": [("p", nn.Parameter(torch.zeros(1)))], **arguments})


def test_an_unknown_stream_and_a_foreign_state_are_refused() -> None:
    gsnr = GradientSNR([("p", nn.Parameter(torch.zeros(4)))])
    with pytest.raises(ValueError, match="unknown stream 'crd': the streams are tog, tcg, ncg"):
        gsnr.update({"crd": None})
    with pytest.raises(ValueError, match="other streams, parameters or another sample="):
        gsnr.load_state_dict(GradientSNR([("p", nn.Parameter(torch.zeros(5)))]).state_dict())


def test_momenta_rise_with_gsnr_between_base_minus_and_plus_span() -> None:
    momenta = suggest_momenta({"tog": 0.04, "tcg": 0.005, "ncg": 0.02})
    assert momenta == pytest.approx({"tog": 0.975, "tcg": 0.825, "ncg": 0.925})
    assert suggest_momenta({"tog": 0.01, "tcg": 0.01, "ncg": 0.01}) == EQUAL
    assert suggest_momenta({"tog": 0.01, "tcg": -0.002}) == pytest.approx({"tog": 0.975, "tcg": 0.825})
    assert suggest_momenta({"tog": -0.1, "tcg": -0.2}) == {"tog": 0.9, "tcg": 0.9}
    rising = list(suggest_momenta({str(i): 1.3**i for i in range(12)}, base=0.5, span=0.4).values())
    assert rising == sorted(rising)
    assert (rising[0], rising[-1]) == pytest.approx((0.1, 0.9))


def test_streams_of_like_gsnr_share_a_momentum() -> None:
    momenta = suggest_momenta({"tog": 0.040, "tcg": 0.005, "ncg": 0.042})
    assert momenta["tog"] == momenta["ncg"] > momenta["tcg"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"tog": math.nan},), "the GSNR of stream 'tog' is nan: measure at least two batches of it"),
        (({"tog": 1.0}, 0.95, 0.05), r"base 0.95 ± span 0.05: momenta must be in \[0, 1\)"),
        (({"tog": 1.0}, 0.05, 0.075), r"base 0.05 ± span 0.075: momenta must be in \[0, 1\)"),
    ],
)
def test_momenta_are_not_suggested_from_nonsense(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        suggest_momenta(*arguments)


def noisy_streams(p: Tensor) -> dict[str, Tensor]:
    """tog and ncg steady, tcg mostly noise."""
    noise = torch.randn(3, p.numel())
    steady = {"tog": 1 + 0.3 * noise[0], "tcg": 0.2 + noise[1], "ncg": 1 + 0.3 * noise[2]}
    return {stream: (p * gradient).sum() for stream, gradient in steady.items()}


def test_auto_momenta_are_set_once_after_the_warmup_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = StreamSGD([p], 1e-3, EQUAL)
    auto = AutoMomenta(optimizer, [("p", p)], warmup=20, every=2)
    passes = []
    for iteration in range(30):
        losses = noisy_streams(p)
        with caplog.at_level(logging.INFO, logger="kd_core.optim.gsnr"):
            auto.observe(losses, iteration)
        optimizer.zero_grad()
        backward_streams(losses, optimizer)
        optimizer.step()
        passes.append(len(optimizer.stream_sets))
    assert passes == [1] * 20 + [2] * 10
    assert optimizer.stream_sets == (("tog", "ncg"), ("tcg",))
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Momenta set at iteration 20 from 10 samples (tog: GSNR ")


def test_auto_momenta_wait_for_a_stream_that_starts_late() -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = StreamSGD([p], 1e-3, EQUAL)
    auto = AutoMomenta(optimizer, [("p", p)], warmup=10, every=2)
    for iteration in range(40):
        losses = noisy_streams(p)
        auto.observe(losses if iteration >= 20 else {"tog": losses["tog"]}, iteration)
        assert (auto.momenta is not None) == (iteration >= 24)


def test_a_stream_without_a_loss_keeps_its_momentum_and_the_others_do_not_wait_for_it() -> None:
    p = nn.Parameter(torch.zeros(1000))
    optimizer = StreamSGD([p], 1e-3, {"tog": 0.9, "tcg": 0.5, "ncg": 0.9})
    auto = AutoMomenta(optimizer, [("p", p)], warmup=10, every=2, streams={"tog", "ncg"})
    for iteration in range(12):
        losses = noisy_streams(p)
        auto.observe({"tog": losses["tog"], "ncg": losses["tcg"]}, iteration)
    measured = suggest_momenta(auto.measured)
    assert measured["tog"] > measured["ncg"]
    assert optimizer.param_groups[0]["momenta"] == auto.momenta == {**measured, "tcg": 0.5}
    assert not auto.gsnr._mean and auto.gsnr.count == {"tog": 5, "ncg": 5}  # the running means are freed


def test_a_state_of_more_streams_is_loaded() -> None:
    p = nn.Parameter(torch.zeros(8))
    saved, gsnr = GradientSNR([("p", p)]), GradientSNR([("p", p)], ["tog", "ncg"])
    for _ in range(3):
        saved.update({"tog": (p * torch.randn(8)).sum(), "ncg": (p * torch.randn(8)).sum()})
    gsnr.load_state_dict(saved.state_dict())
    assert gsnr.count == {"tog": 3, "ncg": 3}
    assert gsnr.overall() == {stream: saved.overall()[stream] for stream in ("tog", "ncg")}


def test_a_warmup_without_two_samples_is_refused() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="warmup 200 holds fewer than two samples at every 200 iterations"):
        AutoMomenta(StreamSGD([p], 0.1, EQUAL), [("p", p)], warmup=200, every=200)
