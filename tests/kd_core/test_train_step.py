"""`TrainStep`: accumulation, clipping, loss scaling and saved state of one optimizer step over streams."""

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kd_core.losses import DKDLoss
from kd_core.optim import StreamAdamW, deepkd_sgd
from kd_core.optim.gsnr import AutoMomenta
from kd_core.train_step import TrainStep, clip_gradients

MOMENTA = {"tog": 0.9, "tcg": 0.8, "ncg": 0.95}
OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "deepkd_sgd": lambda params: deepkd_sgd(params, 0.1, weight_decay=0.01),
    "stream_adamw": lambda params: StreamAdamW(params, 0.01, MOMENTA),
    "torch's SGD": lambda params: torch.optim.SGD(params, 0.1, momentum=0.9),
}


def build_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).double()


def batch_of(seed: int, rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, teacher logits, target."""
    generator = torch.Generator().manual_seed(seed)
    inputs, teacher = (torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    return inputs, teacher, torch.randint(5, (rows,), generator=generator)


def streams_of(net: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    inputs, teacher, target = batch
    logits = net(inputs)
    terms = DKDLoss()(logits, teacher, target)
    return {"tog": nn.functional.cross_entropy(logits, target), "tcg": terms["tckd"], "ncg": terms["nckd"]}


def train(net: nn.Module, step: TrainStep, iterations: Iterable[int], parts: int = 1) -> None:
    """Train on one batch per iteration, split into equal parts."""
    for iteration in iterations:
        micro_batches = list(zip(*(tensor.chunk(parts) for tensor in batch_of(iteration)), strict=True))
        step.backward(micro_batches, lambda part: streams_of(net, part), iteration, weight=1 / parts)
        step.optimizer_step()


def same_weights(net: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_micro_batches_take_the_step_of_the_whole_batch(optimizer: str, max_norm: float | None) -> None:
    weights = []
    for parts in (1, 2, 3):
        net = build_net()
        built = OPTIMIZERS[optimizer](net.parameters())
        clip = None if max_norm is None else lambda built=built: clip_gradients(built, max_norm)
        train(net, TrainStep(built, clip=clip), range(5), parts)
        weights.append(nn.utils.parameters_to_vector(net.parameters()))
    assert (weights[0] - nn.utils.parameters_to_vector(build_net().parameters())).abs().max() > 1e-3
    for split in weights[1:]:
        torch.testing.assert_close(split, weights[0], rtol=0, atol=1e-12)


def test_clipping_scales_all_streams_by_one_factor() -> None:
    net = build_net()
    optimizer = deepkd_sgd(net.parameters(), 0.1, delta_ncg=0.05)  # three momenta, three gradients
    step = TrainStep(optimizer, clip=lambda: clip_gradients(optimizer, 0.01))
    step.backward([batch_of(0)], lambda batch: streams_of(net, batch), 0)
    before = [{p: g.clone() for p, g in gradient.items()} for gradient in optimizer.gradients.of_set]
    factor = 0.01 / nn.utils.get_total_norm([p.grad for p in net.parameters()])
    step.optimizer_step()
    assert len(before) == 3 and factor < 0.1
    for unclipped, clipped in zip(before, optimizer.gradients.of_set, strict=True):
        for p, gradient in unclipped.items():
            torch.testing.assert_close(clipped[p], gradient * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_norm_of_all_streams_is_clipped_unscaled_under_a_loss_scale(optimizer: str) -> None:
    net = build_net()
    built = OPTIMIZERS[optimizer](net.parameters())
    norms: list[Tensor] = []
    step = TrainStep(built, torch.float16, clip=lambda: norms.append(clip_gradients(built, 0.01)))
    plain = torch.autograd.grad(sum(streams_of(net, batch_of(0)).values()), list(net.parameters()))
    train(net, step, range(1))
    torch.testing.assert_close(norms[0], nn.utils.get_total_norm(plain), rtol=1e-6, atol=0, check_dtype=False)
    assert nn.utils.get_total_norm([p.grad for p in net.parameters()]).item() == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stream", ["tog", "tcg", "ncg"])
def test_an_infinity_in_one_stream_skips_the_step_of_all(optimizer: str, stream: str) -> None:
    net = build_net()
    step = TrainStep(OPTIMIZERS[optimizer](net.parameters()), torch.float16)
    scale = step.scaler.get_scale()

    def overflowing(batch: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
        losses = streams_of(net, batch)
        return losses | {stream: losses[stream] * math.inf}

    step.backward([batch_of(0), batch_of(1)], overflowing, 0, weight=0.5)
    step.optimizer_step()
    assert same_weights(net, build_net()) and step.scaler.get_scale() == scale / 2
    train(net, step, [1])  # the gradients of the skipped step are gone
    assert not same_weights(net, build_net()) and all(p.isfinite().all() for p in net.parameters())


def build_step(net: nn.Module) -> TrainStep:
    """DeepKD with float16's loss scaler and momenta that are set at iteration 6."""
    optimizer = deepkd_sgd(net.parameters(), 0.05, nesterov=True)
    return TrainStep(optimizer, torch.float16, auto_momenta=AutoMomenta(optimizer, net.named_parameters(), 6, every=2))


@pytest.mark.parametrize("stop", [3, 8])
def test_a_saved_step_continues_to_the_bit_before_and_after_momenta_are_set(stop: int) -> None:
    whole, first, resumed = build_net(), build_net(), build_net()
    steps = [build_step(net) for net in (whole, first, resumed)]
    train(whole, steps[0], range(12), parts=2)
    train(first, steps[1], range(stop), parts=2)
    state = steps[1].state_dict()
    assert list(state) == ["optimizer", "scaler", "auto_momenta"]
    resumed.load_state_dict(first.state_dict())
    steps[2].load_state_dict(state)
    train(resumed, steps[2], range(stop, 12), parts=2)
    assert same_weights(whole, resumed) and not same_weights(whole, first)
    assert steps[2].auto_momenta.momenta == steps[0].auto_momenta.momenta is not None


def test_a_state_without_scaler_and_momenta_leaves_them_as_they_are() -> None:
    plain = TrainStep(deepkd_sgd(build_net().parameters(), 0.05)).state_dict()
    assert plain["scaler"] == {} and plain["auto_momenta"] is None
    for state in (plain, {"optimizer": plain["optimizer"]}):
        step = build_step(build_net())
        scale = step.scaler.get_scale()
        step.load_state_dict(state)
        assert step.scaler.get_scale() == scale and step.auto_momenta.momenta is None


def test_gsnr_is_measured_on_the_first_micro_batch_without_its_weight() -> None:
    net = build_net()
    split, alone = build_step(net), build_step(net)
    split.backward([batch_of(0), batch_of(1)], lambda batch: streams_of(net, batch), 0, weight=0.5)
    alone.backward([batch_of(0)], lambda batch: streams_of(net, batch), 0)
    found, expected = (step.auto_momenta.state_dict()["gsnr"] for step in (split, alone))
    assert found["count"] == expected["count"] == {"tog": 1, "tcg": 1, "ncg": 1}
    for stream, means in expected["mean"].items():
        assert all(torch.equal(a, b) for a, b in zip(found["mean"][stream], means, strict=True))
