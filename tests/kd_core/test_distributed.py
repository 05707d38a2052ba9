"""Streams over two and three real gloo ranks, float64, no BatchNorm. What the ranks do is in ranks.py."""

import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import HELPERS, forked
from kd_core.distributed import flat_bucket, make_buckets
from kd_core.optim import StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams

WORKER = HELPERS / "ranks.py"


def load_worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ranks", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ranks = load_worker()


@pytest.fixture(scope="module", params=[2, 3], ids=["two ranks", "three ranks"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of a group saved."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    done = forked.run([WORKER, world, folder])
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def assert_close(params: list[Tensor], reference: nn.Module, tolerance: float) -> None:
    for p, q in zip(params, reference.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=0, atol=tolerance)


def test_every_ranks_parameters_are_identical_to_the_bit(results: list[dict[str, Any]]) -> None:
    for name, params in results[0].items():
        for other in results[1:]:
            if isinstance(params, list) and isinstance(params[0], Tensor):
                assert all(torch.equal(p, q) for p, q in zip(params, other[name], strict=True)), name
            else:
                assert params == other[name], name


@pytest.mark.parametrize("name", ranks.BUILDS)
def test_equal_batches_are_one_process_on_the_whole_batch(results: list[dict[str, Any]], name: str) -> None:
    whole = ranks.train(ranks.BUILDS[name], 0, 1, ddp=False)
    assert (whole.classifier.weight - ranks.Net().classifier.weight).abs().max() > 0.01
    assert_close(results[0][name], whole, 1e-10)


@pytest.mark.parametrize(
    "name", ["plain module", "2 micro-batches", "4 micro-batches", "2 micro-batches, both reduced", "small buckets"]
)
def test_micro_batches_buckets_and_wrapping_change_nothing(results: list[dict[str, Any]], name: str) -> None:
    assert_close(results[0][name], ranks.train(ranks.BUILDS["two sets"], 0, 1, ddp=False), 1e-10)


def test_uneven_batches_and_a_rank_without_a_batch_are_the_mean_over_the_ranks(results: list[dict[str, Any]]) -> None:
    reference, world = ranks.Net(), len(results)
    optimizer = deepkd_sgd(reference.parameters(), 0.05, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(world):
            if not (step == 2 and rank == 0):
                losses = ranks.streams(reference, step, slice(rank, 3 * rank + 1))
                backward_streams({name: loss / world for name, loss in losses.items()}, optimizer)
        optimizer.step()
    assert_close(results[0]["uneven"], reference, 1e-12)


def test_a_rank_without_a_batch_follows_the_scaler_and_the_clipping(results: list[dict[str, Any]]) -> None:
    reference, world = ranks.Net(), len(results)
    optimizer = deepkd_sgd(reference.parameters(), 0.05, weight_decay=0.01)
    for step in range(4):
        optimizer.zero_grad()
        for row in range(2 if step in (0, 2) else 0, 2 * world):
            losses = ranks.streams(reference, step, slice(row, row + 1))
            backward_streams({name: loss / world for name, loss in losses.items()}, optimizer)
        optimizer.clip_grad_norm_(0.5)
        optimizer.step()
    assert_close(results[0]["uneven, scaled"], reference, 1e-12)


def test_a_rank_without_a_stream_counts_as_zero_there_and_does_not_hang(results: list[dict[str, Any]]) -> None:
    reference, world = ranks.Net(), len(results)
    optimizer = StreamSGD(reference.parameters(), 0.05, ranks.THREE, weight_decay=0.01)
    for step in range(5):
        optimizer.zero_grad()
        for rank in range(world):
            losses = ranks.streams(reference, step, ranks.share(rank, world))
            kept = {name: loss / world for name, loss in losses.items() if rank > 0 or name == "tog"}
            if rank == 1 and step == 1:
                del kept["tog"]
            if step == 3:
                kept.pop("ncg", None)
            backward_streams(kept, optimizer)
        optimizer.step()
    assert_close(results[0]["without foreground"], reference, 1e-12)
    never_reached = list(dict(reference.named_parameters())).index("never_reached")
    assert torch.equal(results[0]["without foreground"][never_reached], torch.ones(3).double())


def test_an_infinity_on_one_rank_skips_the_step_on_all_and_halves_the_scale(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["moved"] == [True, False, True]
        assert result["scales"] == [2.0**8, 2.0**7, 2.0**7]


def test_auto_momenta_are_the_same_on_every_rank(results: list[dict[str, Any]]) -> None:
    assert results[0]["auto momenta"] != ranks.EQUAL
    assert all(result["auto momenta"] == results[0]["auto momenta"] for result in results)


def test_a_set_travels_while_the_next_ones_backward_pass_runs(results: list[dict[str, Any]]) -> None:
    for result in results:
        reduction = f"reduce {result['parameter bytes']}"
        assert result["events"] == ["backward", reduction, "backward", reduction]
        assert result["bytes sent"] == 2 * result["parameter bytes"]  # sets × parameters


@pytest.mark.parametrize("case", ["bytes of sets", "bytes of micro-batches", "bytes in small buckets"])
def test_a_step_sends_the_trainable_parameters_once_a_set(results: list[dict[str, Any]], case: str) -> None:
    """Those that no loss reaches too, frozen ones not; micro-batches and bucket sizes make no difference."""
    net = ranks.Net()
    trainable = sum(p.nbytes for p in net.parameters()) - sum(p.nbytes for p in net.backbone.parameters())
    expected = {"one set": trainable, "two sets": 2 * trainable, "three sets": 3 * trainable}
    for result in results:
        assert result[case] == {name: (sent, trainable) for name, sent in expected.items()}


def test_a_bucket_holds_one_dtype_and_at_most_its_bytes() -> None:
    sizes = [(3, torch.float64), (4, torch.float64), (40, torch.float64), (1, torch.float32), (2, torch.float32)]
    params = [nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    buckets = make_buckets(params, bucket_bytes=64)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3, 4], [40], [1, 2]]


def test_gradients_may_be_averaged_within_a_process_group(results: list[dict[str, Any]]) -> None:
    assert all(result["subgroup"] for result in results)


two_ranks = pytest.mark.parametrize("results", [2], indirect=True, ids=["two ranks"])  # enough for fully_shard
FSDP2 = {
    **{f"fsdp2, {name}": name for name in ranks.FSDP2_BUILDS},
    "fsdp2, micro-batches, clipped by torch": "two sets",
}


@two_ranks
@pytest.mark.parametrize("name", FSDP2)
def test_fully_shard_is_one_process_also_when_saved_and_loaded_half_way(
    results: list[dict[str, Any]], name: str
) -> None:
    whole = ranks.Net()
    optimizer = ranks.BUILDS[FSDP2[name]](whole.parameters())
    for step in range(20):
        ranks.fsdp2_step(whole, optimizer, step, 0, 1, parts=1, clip="own")
    assert (whole.classifier.weight - ranks.Net().classifier.weight).abs().max() > 0.01
    assert_close(results[0][name], whole, 1e-10)


@two_ranks
def test_what_would_mix_streams_or_shards_is_refused_by_name(results: list[dict[str, Any]]) -> None:
    said = dict(results[0]["refusals"])
    assert "set_requires_gradient_sync(False)" in said.pop("no reduction")
    assert "p.grad was changed outside backward_streams" in said.pop("changed on rank 0")
    assert "GSNR" in said["gsnr"] and "fully_shard" in said.pop("gsnr")
    assert len(said) == 6
    for name, message in said.items():
        assert "FullyShardedDataParallel (FSDP1)" in message and "fully_shard (FSDP2)" in message, name


def test_what_lies_in_a_bucket_has_its_parameters_layout_and_the_type_of_its_gradient() -> None:
    conv = nn.Parameter(torch.zeros(4, 3, 2, 2).to(memory_format=torch.channels_last))
    flat, (first, second) = flat_bucket([conv, nn.Parameter(torch.zeros(5))])
    assert first.stride() == conv.stride()
    first.fill_(1)
    second.fill_(2)
    assert flat.tolist() == [1] * 48 + [2] * 5
    half = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    half.grad_dtype = torch.float32
    assert [len(bucket) for bucket in make_buckets([half, conv], bucket_bytes=1000)] == [2]
    assert flat_bucket([half])[0].dtype == torch.float32
