"""StreamSGD beside slow, obvious references."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kd_core.losses import DKDLoss
from kd_core.optim import StreamSGD, deepkd_sgd
from kd_core.optim.sgd_kernels import foreach_sgd_, fused_sgd_, sgd_
from kd_core.streams import backward_streams

DEEPKD = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}
THREE = {"tog": 0.9, "tcg": 0.8, "ncg": 0.95}
EQUAL = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}


class TwoHeads(nn.Module):
    """A backbone, a classifier that every stream reaches, and a second head that the task alone reaches (an RPN)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.backbone, self.classifier, self.task_head = nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(9, 2)
        self.never_reached = nn.Parameter(torch.ones(3))
        self.double()

    def streams(self, seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        features = torch.tanh(self.backbone(torch.randn(8, 6, generator=generator, dtype=torch.float64)))
        logits, target = self.classifier(features), torch.randint(5, (8,), generator=generator)
        terms = DKDLoss()(logits, torch.randn(8, 5, generator=generator, dtype=torch.float64), target)
        task = nn.functional.cross_entropy(logits, target) + self.task_head(features).square().mean()
        return {"tog": task, "tcg": terms["tckd"], "ncg": terms["nckd"]}

    def groups(self) -> list[dict[str, Any]]:
        return [
            {"params": [*self.backbone.parameters(), self.never_reached]},
            {"params": self.classifier.parameters(), "lr": 0.02, "weight_decay": 0.0},
            {"params": self.task_head.parameters(), "weight_decay": 0.1},
        ]


class OneSGDPerStream:
    """The reference: a backward pass and a `torch.optim.SGD` for each stream; decay in the first, which moves first."""

    def __init__(
        self, groups: list[dict[str, Any]], momenta: Mapping[str, float], lr: float, decay: float, nesterov: bool
    ) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        self.params = [p for group in groups for p in group["params"]]
        self.optimizers = {}
        for stream, momentum in momenta.items():
            if self.optimizers:  # only the first decays
                groups, decay = [{**group, "weight_decay": 0.0} for group in groups], 0.0
            of_stream = [dict(group) for group in groups]  # torch fills the dicts it is given
            options = {"momentum": momentum, "nesterov": nesterov, "foreach": False}
            self.optimizers[stream] = torch.optim.SGD(of_stream, lr, weight_decay=decay, **options)

    def step(self, losses: Mapping[str, Tensor]) -> None:
        gradients = {}
        for stream, loss in losses.items():
            for p in self.params:
                p.grad = None
            loss.backward(retain_graph=True)
            gradients[stream] = [p.grad for p in self.params]
        reached = [any(g[i] is not None for g in gradients.values()) for i in range(len(self.params))]
        for stream, optimizer in self.optimizers.items():
            for p, g, is_reached in zip(self.params, gradients[stream], reached, strict=True):
                p.grad = torch.zeros_like(p) if g is None and is_reached else g
            optimizer.step()


def largest_difference(first: nn.Module, second: nn.Module) -> float:
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def cosine(step: int) -> float:
    return 0.5 * (1 + torch.cos(torch.tensor(step / 100 * torch.pi, dtype=torch.float64)).item())


@pytest.mark.parametrize(
    ("momenta", "nesterov"),  # torch's SGD has no nesterov without momentum
    [(DEEPKD, False), (DEEPKD, True), (THREE, False), (THREE, True), (EQUAL, True), ({**THREE, "tcg": 0.0}, False)],
)
def test_it_is_one_sgd_per_stream_over_a_hundred_steps(momenta: dict[str, float], nesterov: bool) -> None:
    model, reference_model = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.groups(), 0.01, momenta, weight_decay=5e-3, decay_stream="tog", nesterov=nesterov)
    reference = OneSGDPerStream(reference_model.groups(), momenta, 0.01, 5e-3, nesterov)
    optimizers = [optimizer, *reference.optimizers.values()]
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, cosine) for each in optimizers]
    for step in range(100):
        optimizer.zero_grad()
        backward_streams(model.streams(step), optimizer)
        optimizer.step()
        reference.step(reference_model.streams(step))
        for schedule in schedules:
            schedule.step()
    assert largest_difference(model, TwoHeads()) > 0.05
    assert largest_difference(model, reference_model) <= 1e-12


def test_equal_momenta_are_one_torch_sgd_on_the_summed_loss() -> None:
    model, plain = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.groups(), 0.01, EQUAL, weight_decay=5e-3)
    sgd = torch.optim.SGD(plain.groups(), 0.01, momentum=0.9, weight_decay=5e-3)
    for step in range(100):
        optimizer.zero_grad()
        backward_streams(model.streams(step), optimizer)
        optimizer.step()
        sgd.zero_grad()
        sum(plain.streams(step).values()).backward()
        sgd.step()
    assert largest_difference(model, plain) <= 1e-12


def test_with_one_stream_plain_backward_and_torch_clipping_work_as_with_sgd() -> None:
    model, plain = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, {"tog": 0.9}, weight_decay=5e-3)
    sgd = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=5e-3)
    for step in range(10):
        for each, its_optimizer in ((model, optimizer), (plain, sgd)):
            its_optimizer.zero_grad()
            sum(each.streams(step).values()).backward()
            nn.utils.clip_grad_value_(each.parameters(), 0.01)
            its_optimizer.step()
    assert largest_difference(model, plain) <= 1e-14


def test_micro_batches_add_up() -> None:
    model, whole = TwoHeads(), TwoHeads()
    optimizers = [deepkd_sgd(m.groups(), 0.01, weight_decay=0.1) for m in (model, whole)]
    for step in range(5):
        seeds = [3 * step, 3 * step + 1, 3 * step + 2]
        for seed in seeds:
            backward_streams(model.streams(seed), optimizers[0], sync=False)
        batches = [whole.streams(seed) for seed in seeds]
        backward_streams({s: sum(batch[s] for batch in batches) for s in DEEPKD}, optimizers[1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert largest_difference(model, whole) <= 1e-12


def test_matched_steps_travel_as_far_as_plain_sgd_under_a_constant_gradient() -> None:
    distance = {}
    for step in ("paper", "matched"):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = StreamSGD([p], 0.01, DEEPKD, step=step, base_momentum=0.9)
        for _ in range(2000):
            before = p.detach().clone()
            optimizer.zero_grad()
            backward_streams({"tog": p.sum(), "tcg": p.sum()}, optimizer)
            optimizer.step()
        distance[step] = (before - p.detach())[0].item()
    assert distance["paper"] == pytest.approx(0.01 * (1 / 0.025 + 1 / 0.175), rel=1e-9)
    assert distance["matched"] == pytest.approx(0.01 * 2 / (1 - 0.9), rel=1e-9)


def test_matched_scales_what_the_paper_adds_by_the_momenta() -> None:
    model, reference = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, {"tog": 0.975}, weight_decay=0.1, step="matched", base_momentum=0.9)
    sgd = torch.optim.SGD(reference.parameters(), 0.01 * (1 - 0.975) / (1 - 0.9), momentum=0.975, weight_decay=0.1)
    for step in range(10):
        backward_streams({"tog": sum(model.streams(step).values())}, optimizer)
        sum(reference.streams(step).values()).backward()
        for each in (optimizer, sgd):
            each.step()
            each.zero_grad()
    assert largest_difference(model, reference) <= 1e-14


def test_every_parameter_decays_once_whichever_streams_reach_it() -> None:
    for decay_stream in DEEPKD:
        model = TwoHeads()
        optimizer = StreamSGD(model.parameters(), 0.01, DEEPKD, weight_decay=0.1, decay_stream=decay_stream)
        before = model.task_head.weight.detach().clone()
        losses = model.streams(0)
        gradient = torch.autograd.grad(losses["tog"], model.task_head.weight, retain_graph=True)[0]
        backward_streams(losses, optimizer)
        optimizer.step()
        expected = before - 0.01 * (gradient + 0.1 * before)
        torch.testing.assert_close(model.task_head.weight, expected, rtol=0, atol=1e-15)


def test_the_task_decays_by_default_and_the_first_stream_where_there_is_no_task() -> None:
    p = nn.Parameter(torch.zeros(1))
    assert StreamSGD([p], 0.1, {"tcg": 0.9, "tog": 0.8}).param_groups[0]["decay_stream"] == "tog"
    assert StreamSGD([p], 0.1, {"hints": 0.9, "logits": 0.8}).param_groups[0]["decay_stream"] == "hints"


def test_a_stream_that_stops_reaching_a_parameter_goes_on_by_its_momentum() -> None:
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = StreamSGD([p], 1.0, {"tog": 0.5, "tcg": 0.25})
    backward_streams({"tog": 0 * p.sum(), "tcg": p.sum()}, optimizer)
    for expected in (0.0, -0.25, -0.3125):
        optimizer.step()
        assert p.item() == expected
        optimizer.zero_grad()
        backward_streams({"tog": 0 * p.sum()}, optimizer)


def test_a_momentum_that_was_0_for_a_while_does_not_bring_its_old_buffer_back() -> None:
    """v = 0·v + g meanwhile, as in the formula."""
    p = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = StreamSGD([p], 1.0, {"tog": 0.75, "tcg": 0.5})

    def step(tcg: float) -> float:
        optimizer.zero_grad()
        before = p.item()
        backward_streams({"tog": 0 * p.sum(), "tcg": tcg * p.sum()}, optimizer)
        optimizer.step()
        return before - p.item()

    assert step(1.0) == 1.0
    optimizer.set_momenta({"tog": 0.75, "tcg": 0.0})
    assert [step(0.0), step(0.25)] == [0.0, 0.25]
    optimizer.set_momenta({"tog": 0.75, "tcg": 0.5})
    assert [step(0.0), step(0.0)] == [0.125, 0.0625]  # of the last gradient, not of the first


def test_a_parameter_that_no_stream_reaches_does_not_move_and_has_no_state() -> None:
    model = TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, DEEPKD, weight_decay=0.1)
    backward_streams(model.streams(0), optimizer)
    optimizer.step()
    assert torch.equal(model.never_reached, torch.ones(3).double())
    assert not optimizer.state.get(model.never_reached)
    assert list(optimizer.state[model.task_head.weight]["momentum_buffers"]) == ["tog+ncg"]


def test_step_without_gradients_does_nothing() -> None:
    model = TwoHeads()
    optimizer = deepkd_sgd(model.parameters(), 0.1, weight_decay=0.1)
    optimizer.step()
    assert largest_difference(model, TwoHeads()) == 0


def test_zeroed_gradients_let_momentum_and_decay_go_on_as_in_torch() -> None:
    model, plain = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, {"tog": 0.9, "tcg": 0.9, "ncg": 0.9 + 1e-6}, weight_decay=0.1)
    sgd = torch.optim.SGD(plain.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for step in range(3):
        backward_streams(model.streams(step), optimizer)
        sum(plain.streams(step).values()).backward()
        for each in (optimizer, sgd):
            each.step()
            each.zero_grad(set_to_none=False)
            each.step()
    assert largest_difference(model, plain) <= 1e-6
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_a_tensor_as_learning_rate_and_a_closure_work_as_in_torch() -> None:
    model, other = TwoHeads(), TwoHeads()
    with_tensor = deepkd_sgd(model.parameters(), torch.tensor(0.01, dtype=torch.float64), weight_decay=0.1)
    with_number = deepkd_sgd(other.parameters(), 0.01, weight_decay=0.1)

    def closure() -> Tensor:
        losses = model.streams(0)
        backward_streams(losses, with_tensor)
        return losses["tog"]

    expected = model.streams(0)["tog"]
    assert torch.equal(with_tensor.step(closure), expected)
    backward_streams(other.streams(0), with_number)
    with_number.step()
    assert largest_difference(model, other) <= 1e-15


@pytest.mark.parametrize("momenta", [DEEPKD, THREE, EQUAL])
def test_clipping_scales_every_stream_by_one_factor(momenta: dict[str, float]) -> None:
    model, reference = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, momenta)
    backward_streams(model.streams(0), optimizer)
    norm = optimizer.clip_grad_norm_(0.1)
    sum(reference.streams(0).values()).backward()
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.1)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
    factor = 0.1 / (expected + 1e-6)
    optimizer.step()
    reference = TwoHeads()
    one_sgd_per_stream = OneSGDPerStream([{"params": reference.parameters()}], momenta, 0.01, 0.0, False)
    one_sgd_per_stream.step({s: factor * loss for s, loss in reference.streams(0).items()})
    assert largest_difference(model, reference) <= 1e-14


@pytest.mark.parametrize("momenta", [DEEPKD, THREE, EQUAL])
def test_clipping_each_parameter_scales_its_streams_by_one_factor(momenta: dict[str, float]) -> None:
    model, reference = TwoHeads(), TwoHeads()
    optimizer = StreamSGD(model.parameters(), 0.01, momenta)
    backward_streams(model.streams(0), optimizer)
    streams = [{p: g.clone() for p, g in gradient.items()} for gradient in optimizer.gradients.of_set]
    sum(reference.streams(0).values()).backward()
    pairs = [pair for pair in zip(model.parameters(), reference.parameters(), strict=True) if pair[1].grad is not None]
    limit = sorted(q.grad.norm().item() for _, q in pairs)[len(pairs) // 2]
    optimizer.clip_each_grad_norm_(limit)
    clipped = 0
    for p, q in pairs:
        before = q.grad.norm()
        nn.utils.clip_grad_norm_([q], limit)
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-15)
        clipped += int(before > limit)
        for gradient, start in zip(optimizer.gradients.of_set, streams, strict=True):
            if len(streams) > 1 and p in gradient:
                factor = (limit / (before + 1e-6)).clamp(max=1)
                torch.testing.assert_close(gradient[p], start[p] * factor, rtol=1e-12, atol=1e-15)
    assert 0 < clipped < len(pairs)
    optimizer.step()


def test_clipping_below_the_limit_changes_nothing() -> None:
    model = TwoHeads()
    optimizer = deepkd_sgd(model.parameters(), 0.01)
    backward_streams(model.streams(0), optimizer)
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.clip_grad_norm_(1e6)
    after = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def lists(dtype: torch.dtype, channels_last: bool = False) -> Iterator[list[Tensor]]:
    """θ, g, v: the same numbers at every call."""
    torch.manual_seed(11)
    for _ in range(3):
        tensors = [torch.randn(7, dtype=dtype), torch.randn(4, 3, 5, 5, dtype=dtype), torch.randn((), dtype=dtype)]
        if channels_last:
            tensors[1] = tensors[1].to(memory_format=torch.channels_last)
        yield tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_the_fused_kernel_is_the_foreach_one(
    dtype: torch.dtype, channels_last: bool, momentum: float, nesterov: bool
) -> None:
    fast, slow = [list(lists(dtype, channels_last)) for _ in range(2)]
    if momentum == 0:
        fast[2] = slow[2] = None
    fused_sgd_(*fast, 0.1, momentum, 0.01, nesterov)
    foreach_sgd_(*slow, 0.1, momentum, 0.01, nesterov)
    rounding = 8 * torch.finfo(dtype).eps
    for a, b in zip(fast[0] + (fast[2] or []), slow[0] + (slow[2] or []), strict=True):
        torch.testing.assert_close(a, b, rtol=rounding, atol=rounding)


def test_a_gradient_in_another_memory_format_does_not_meet_the_fused_kernel() -> None:
    """That kernel reads memory in order: it would add the wrong elements, and say nothing."""
    params, grads, buffers = lists(torch.float64, channels_last=True)
    expected = [p - 0.1 * (g + 0.9 * v) for p, g, v in zip(params, grads, buffers, strict=True)]
    grads[1] = grads[1].contiguous()
    sgd_(params, grads, buffers, 0.1, 0.9, 0.0, False)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_a_model_may_change_its_memory_format_between_steps() -> None:
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)).double() for _ in range(2)]
    inputs = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for model in models:
        model(inputs)
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [deepkd_sgd(model.parameters(), 0.01, weight_decay=0.1) for model in models]
    for step in range(4):
        if step == 2:
            models[0].to(memory_format=torch.channels_last)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            logits = model(inputs)
            backward_streams({"tog": logits.square().mean(), "tcg": logits.abs().mean()}, optimizer)
            optimizer.step()
    assert largest_difference(*models) <= 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": -0.1}, "lr is -0.1: it must be ≥ 0"),
        ({"lr": float("nan")}, "lr is nan: it must be ≥ 0"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001: it must be ≥ 0"),
        ({"momenta": {"tog": 1.0}}, r"the momentum of stream 'tog' is 1.0: it must be in \[0, 1\)"),
        ({"momenta": {"tog": -0.1}}, r"the momentum of stream 'tog' is -0.1: it must be in \[0, 1\)"),
        ({"momenta": {}}, "momenta is empty: give {stream: momentum}"),
        ({"momenta": {"a+b": 0.9}}, r"the stream name 'a\+b' has a '\+'"),
        ({"decay_stream": "task"}, "decay_stream is 'task': it must be one of tog, tcg, ncg"),
        ({"step": "papers"}, "step is 'papers': it must be 'paper' or 'matched'"),
        ({"base_momentum": 1.0}, r"base_momentum is 1.0: it must be in \[0, 1\)"),
    ],
)
def test_a_value_out_of_its_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamSGD([nn.Parameter(torch.zeros(1))], **{"lr": 0.1, "momenta": DEEPKD, **arguments})


@pytest.mark.parametrize(
    ("momenta", "message"),
    [
        ({"tog": 0.9, "tcg": 0.8}, "stream 'ncg' is missing from momenta"),
        ({**DEEPKD, "crd": 0.9}, "unknown stream 'crd' in momenta: the streams are tog, tcg, ncg"),
    ],
)
def test_every_group_names_the_same_streams(momenta: dict[str, float], message: str) -> None:
    p, q = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        StreamSGD([{"params": [p]}, {"params": [q], "momenta": momenta}], 0.1, DEEPKD)
    with pytest.raises(ValueError, match=message):
        StreamSGD([p], 0.1, DEEPKD).set_momenta(momenta)


@pytest.mark.parametrize("momenta", [EQUAL, THREE])
def test_a_parameter_that_is_frozen_after_the_backward_pass_moves_as_in_torch(momenta):
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = StreamSGD([p, q], 0.1, momenta)
    backward_streams({"tog": (p + q).sum(), "ncg": (p + q).sum()}, optimizer)
    q.requires_grad_(False)
    optimizer.step()
    assert torch.allclose(q, torch.full((2,), 0.8)) and torch.equal(p, q)
