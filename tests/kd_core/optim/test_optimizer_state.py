"""State of the stream optimizers: saved, moved, copied, split and merged; and other people's schedulers on top."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from detectron2.solver.lr_scheduler import LRMultiplier
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from kd_core.optim import StreamAdamW, StreamOptimizer, StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
DEEPKD = {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}
THREE = {"tog": 0.9, "tcg": 0.8, "ncg": 0.95}
EQUAL = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}


def net() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def streams(model: nn.Module, seed: int) -> dict[str, Tensor]:
    outputs = model(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return {"tog": outputs.square().mean(), "tcg": outputs[:, 0].mean(), "ncg": outputs.exp().mean()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        backward_streams(streams(model, step), optimizer)
        optimizer.step()


def assert_identical(model: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


@pytest.fixture(params=["sgd", "adamw"])
def build(request: pytest.FixtureRequest):
    def build_optimizer(model: nn.Sequential, momenta: dict[str, float] = DEEPKD) -> StreamOptimizer:
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.02}]
        if request.param == "sgd":
            return StreamSGD(groups, 0.01, momenta, weight_decay=0.1, nesterov=True)
        return StreamAdamW(groups, 0.01, momenta)

    return build_optimizer


def test_a_saved_state_goes_on_to_the_bit_in_a_freshly_built_optimizer(build) -> None:
    straight, model = net(), net()
    train(straight, build(straight), range(20))
    optimizer = build(model)
    train(model, optimizer, range(10))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = net()
    resumed.load_state_dict(saved["model"])
    fresh = build(resumed, EQUAL)  # the saved momenta are taken over, as all of a group is in torch
    fresh.load_state_dict(saved["optimizer"])
    assert fresh.stream_sets == optimizer.stream_sets
    train(resumed, fresh, range(10, 20))
    assert_identical(resumed, straight)


@pytest.mark.parametrize("target", [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_state_loads_a_second_time_and_into_a_copy(build, target) -> None:
    model = net()
    optimizer = build(model)
    train(model, optimizer, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    other = target(optimizer)
    for _ in range(2):
        other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == state["param_groups"]
    other.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert set(other.param_groups[-1]) == set(other.param_groups[0])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_written_at_96e214b_resumes_as_it_did_there(name: str) -> None:
    """Three steps of this file's `train` were saved there, and the parameters after three more."""
    saved = torch.load(GOLDEN / "optimizer_states_96e214b.pt", weights_only=True)[name]
    model = net()
    model.load_state_dict(saved["model"])
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = StreamSGD(groups, 1.0, EQUAL) if name == "sgd" else StreamAdamW(groups, 1.0, EQUAL)
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, range(3, 6))
    for p, after in zip(model.parameters(), saved["after"], strict=True):
        torch.testing.assert_close(p.detach(), after, rtol=0, atol=1e-13)


def test_torchs_distributed_checkpoint_builds_and_sets_the_state(build, tmp_path: Path) -> None:
    """Its `set_optimizer_state_dict` steps gradients of zero to build the state that it fills."""
    model, straight = net(), net()
    optimizer = build(model)
    train(model, optimizer, range(3))
    dcp.save(
        {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=tmp_path
    )
    resumed = net()
    fresh = build(resumed, DEEPKD)
    saved = {"model": resumed.state_dict(), "optimizer": get_optimizer_state_dict(resumed, fresh)}
    dcp.load(saved, checkpoint_id=tmp_path)
    resumed.load_state_dict(saved["model"])
    set_optimizer_state_dict(resumed, fresh, saved["optimizer"])
    train(resumed, fresh, range(3, 6))
    train(straight, build(straight), range(6))
    assert_identical(resumed, straight)


def test_a_state_moves_to_the_device_and_dtype_of_its_parameters(build) -> None:
    model, half = net(), net().float()
    optimizer, other = build(model), build(half)
    train(model, optimizer, range(3))
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        assert all(buffer.dtype == torch.float32 for buffer in state["momentum_buffers"].values())
    meta = nn.Sequential(nn.Linear(4, 6, device="meta"), nn.Tanh(), nn.Linear(6, 3, device="meta"))
    other = build(meta)
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        assert all(buffer.device.type == "meta" for buffer in state["momentum_buffers"].values())


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_of_model_and_optimizer_goes_on_as_the_original(build, how) -> None:
    model = net()
    optimizer = build(model)
    train(model, optimizer, range(3))
    other, other_optimizer = how((model, optimizer))
    train(other, other_optimizer, range(3, 6))
    train(model, optimizer, range(3, 6))
    assert_identical(model, other)


def test_a_group_added_later_trains_with_its_own_momenta(build) -> None:
    model, extra = net(), nn.Parameter(torch.ones(2).double())
    optimizer = build(model)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": [extra], "momenta": THREE, "lr": 0.1, "weight_decay": 0.0})
    assert optimizer.stream_sets == (("tog",), ("tcg",), ("ncg",))
    assert optimizer.param_groups[0]["momenta"] == DEEPKD
    optimizer.zero_grad()
    backward_streams({**streams(model, 2), "tcg": extra.square().sum()}, optimizer)
    optimizer.step()
    assert list(optimizer.state[extra]["momentum_buffers"]) == ["tcg"]
    assert (extra < 1).all()


def test_groups_do_not_share_their_momenta() -> None:
    model = net()
    momenta = dict(DEEPKD)
    optimizer = StreamSGD([{"params": [p]} for p in model.parameters()], 0.1, momenta)
    optimizer.param_groups[0]["momenta"]["tcg"] = 0.5
    assert optimizer.param_groups[1]["momenta"] == DEEPKD == momenta


def buffers(optimizer: StreamOptimizer, model: nn.Sequential) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in optimizer.state[model[0].weight]["momentum_buffers"].items()}


def test_a_split_leaves_the_whole_buffer_with_the_decay_stream() -> None:
    model = net()
    optimizer = StreamSGD(model.parameters(), 0.01, DEEPKD, weight_decay=0.1, decay_stream="ncg")
    train(model, optimizer, range(3))
    before = buffers(optimizer, model)
    optimizer.set_momenta(THREE)
    optimizer.zero_grad()
    optimizer.step()
    after = buffers(optimizer, model)
    assert set(after) == {"ncg", "tcg"}  # tog's is 0, and not yet made
    assert torch.equal(after["ncg"], before["tog+ncg"])
    assert torch.equal(after["tcg"], before["tcg"])


def test_a_split_set_without_the_decay_stream_leaves_its_buffer_with_its_first_stream() -> None:
    model = net()
    optimizer = StreamSGD(model.parameters(), 0.01, {"tog": 0.8, "tcg": 0.9, "ncg": 0.9}, decay_stream="tog")
    train(model, optimizer, range(3))
    before = buffers(optimizer, model)
    optimizer.set_momenta(THREE)
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(buffers(optimizer, model)["tcg"], before["tcg+ncg"])


def test_merging_sets_adds_their_buffers_and_changes_no_trajectory() -> None:
    """Σ v is what moves θ: after a merge the next step is that of the separate buffers under the common momentum."""
    model = net()
    optimizer = StreamSGD(model.parameters(), 0.01, THREE, weight_decay=0.1)
    train(model, optimizer, range(3))
    before, theta = buffers(optimizer, model), model[0].weight.detach().clone()
    optimizer.set_momenta(EQUAL)
    losses = streams(model, 3)
    gradient = torch.autograd.grad(sum(losses.values()), model[0].weight, retain_graph=True)[0]
    optimizer.zero_grad()
    backward_streams(losses, optimizer)
    optimizer.step()
    v = 0.9 * sum(before.values()) + gradient + 0.1 * theta
    torch.testing.assert_close(buffers(optimizer, model)["tog+tcg+ncg"], v, rtol=0, atol=1e-14)
    torch.testing.assert_close(model[0].weight.detach(), theta - 0.01 * v, rtol=0, atol=1e-14)


def test_regrouping_and_back_keeps_every_buffer_somewhere(build) -> None:
    model = net()
    optimizer = build(model, THREE)
    train(model, optimizer, range(3))
    before = sum(buffers(optimizer, model).values())
    for momenta in (DEEPKD, EQUAL, THREE):
        optimizer.set_momenta(momenta)
        optimizer.zero_grad()
        optimizer.step()
    torch.testing.assert_close(sum(buffers(optimizer, model).values()), before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_momenta_may_be_set_before_the_gradients_are_zeroed(build, set_to_none: bool) -> None:
    model = net()
    optimizer = build(model, DEEPKD)
    train(model, optimizer, range(2))
    optimizer.set_momenta(THREE)
    optimizer.zero_grad(set_to_none)
    backward_streams(streams(model, 2), optimizer)
    optimizer.step()
    assert set(buffers(optimizer, model)) == {"tog", "tcg", "ncg"}


def test_momenta_edited_in_the_groups_regroup_as_well(build) -> None:
    model = net()
    optimizer = build(model, DEEPKD)
    train(model, optimizer, range(3))
    for group in optimizer.param_groups:
        group["momenta"] = dict(EQUAL)
    train(model, optimizer, range(3, 5))
    assert set(buffers(optimizer, model)) == {"tog+tcg+ncg"}


def test_the_state_of_another_optimizer_is_refused_by_name() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = deepkd_sgd(model.parameters(), 0.1)
    with pytest.raises(
        ValueError, match="not a state of StreamSGD: its groups have no base_momentum, decay_stream, momenta"
    ):
        optimizer.load_state_dict(sgd.state_dict())
    other_streams = StreamSGD(model.parameters(), 0.1, {"task": 0.9, "distill": 0.8})
    with pytest.raises(ValueError, match="unknown stream 'task' in momenta: the streams are tog, tcg, ncg"):
        optimizer.load_state_dict(other_streams.state_dict())


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4]),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=False),
        lambda o: CosineLRScheduler(o, t_initial=6, warmup_t=2, warmup_lr_init=1e-4),
        lambda o: LRMultiplier(o, CosineParamScheduler(1, 0), max_iter=6),
        lambda o: LRMultiplier(o, MultiStepParamScheduler([1, 0.1], milestones=[3], num_updates=6), max_iter=6),
    ],
    ids=["torch MultiStepLR", "torch OneCycleLR", "timm cosine", "detectron2 cosine", "detectron2 multi-step"],
)
def test_schedulers_of_torch_timm_and_detectron2_set_the_same_rates_as_on_sgd(schedule) -> None:
    model, plain = net(), net()
    groups = [[{"params": m[0].parameters()}, {"params": m[2].parameters(), "lr": 0.05}] for m in (model, plain)]
    pair = [StreamSGD(groups[0], 0.1, EQUAL), torch.optim.SGD(groups[1], 0.1, momentum=0.9)]
    schedules = [schedule(optimizer) for optimizer in pair]
    for step in range(6):
        for each, optimizer in zip((model, plain), pair, strict=True):
            train(each, optimizer, range(step, step + 1))
        for each in schedules:
            each.step(step + 1) if isinstance(each, CosineLRScheduler) else each.step()
        assert [g["lr"] for g in pair[0].param_groups] == [g["lr"] for g in pair[1].param_groups]
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
