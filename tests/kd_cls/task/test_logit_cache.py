"""The teacher's logits on disk."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kd_cls.build import build_trainer, fingerprint
from kd_cls.data.bad_images import SkipsUnreadable
from kd_cls.data.images import ImageList
from kd_cls.data.wrapped import AllButEveryNth, EveryNth
from kd_cls.distributed import Process
from kd_cls.task.logit_cache import LogitCache
from kd_cls.train import train
from kd_core.utils.errors import UserError

CACHED = ["KD.LOSS.NAME", "dkd", "KD.TEACHER.CACHE"]


def cache(folder: Path, kind: str = "full", **options: Any) -> LogitCache:
    arguments = {"num_images": 12, "num_classes": 50, "epochs": 2, "identity": {"teacher": "a"}, "topk": 8} | options
    return LogitCache(folder, kind, **arguments)


def test_what_is_written_is_read_back_to_the_bit_also_by_another_process(tmp_path: Path) -> None:
    logits, indices = torch.randn(3, 50) * 1e4, torch.tensor([7, 0, 11])
    first = cache(tmp_path)
    assert first.read(0, indices) is None
    first.write(0, indices, logits)
    second = cache(tmp_path)
    assert torch.equal(second.read(0, indices.flip(0)), logits.flip(0))
    assert second.read(0, torch.tensor([7, 1])) is None  # one of them is absent
    assert second.read(1, indices) is None and torch.equal(second.read(2, indices), logits)  # epochs come round


def test_topk_keeps_the_largest_and_the_mass_of_the_rest(tmp_path: Path) -> None:
    logits, indices = torch.randn(12, 50) * 3, torch.arange(12)
    kept = cache(tmp_path, "topk")
    kept.write(0, indices, logits)
    found, exact = kept.read(0, indices).softmax(1), logits.softmax(1)
    top = exact.topk(8).indices
    assert torch.allclose(found.gather(1, top), exact.gather(1, top), rtol=5e-3)
    rest = found.scatter(1, top, 0)
    assert torch.allclose(rest.sum(1), exact.scatter(1, top, 0).sum(1), rtol=5e-3)
    assert (rest > 0).sum(1).eq(42).all() and torch.allclose(rest.amax(1) * 42, rest.sum(1))


def test_extreme_logits_survive_topk(tmp_path: Path) -> None:
    logits = torch.zeros(2, 50)
    logits[0, 3], logits[1] = 1e30, -1e30
    kept = cache(tmp_path, "topk")
    kept.write(0, torch.tensor([0, 1]), logits)
    found = kept.read(0, torch.tensor([0, 1]))
    assert found.isfinite().all() and found[0].argmax() == 3
    assert torch.allclose(found[1].softmax(0), torch.full((50,), 1 / 50), rtol=1e-2)


def test_a_record_that_was_half_written_counts_as_absent(tmp_path: Path) -> None:
    kept = cache(tmp_path)
    kept.write(0, torch.tensor([2]), torch.randn(1, 50))
    kept.records(0)["value"][2, 49] += 1
    assert cache(tmp_path).read(0, torch.tensor([2])) is None


def test_a_cache_of_another_teacher_is_refused(tmp_path: Path) -> None:
    cache(tmp_path)
    with pytest.raises(
        ValueError, match=r"KD.TEACHER.CACHE_DIR: .* is a cache of another teacher \(a, this run has b\)"
    ):
        cache(tmp_path, identity={"teacher": "b"})


def test_sizes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"KD.TEACHER.CACHE_TOPK is 50, expected 1 … 49 for 50 classes"):
        cache(tmp_path, "topk", topk=50)
    with pytest.raises(UserError, match=r"KD.TEACHER.CACHE is 'half', expected one of none, full, topk"):
        cache(tmp_path, "half")
    with pytest.raises(UserError, match=r"would take .* GB .* set DATA.AUGMENTATION_EPOCHS"):
        cache(tmp_path, num_images=10**12)


@pytest.mark.parametrize("options", [["KD.LOSS.NAME", "dkd"], ["KD.LOSS.NAME", "crld", "DATA.VIEWS", 2]])
def test_training_from_the_cache_is_training_with_the_teacher_to_the_bit(
    options: list, run: Callable, tmp_path: Path
) -> None:
    with_teacher = run(*options, "OUTPUT_DIR", tmp_path / "teacher")
    options = [*options, "KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", tmp_path / "cache"]
    filling = run(*options, "OUTPUT_DIR", tmp_path / "filling")
    reading = run(*options, "OUTPUT_DIR", tmp_path / "reading")
    for name, tensor in with_teacher["model"].items():
        assert torch.equal(tensor, filling["model"][name]) and torch.equal(tensor, reading["model"][name]), name


def test_the_second_run_and_repeated_epochs_do_not_ask_the_teacher(
    tiny: Callable, process: Process, tmp_path: Path
) -> None:
    def passes(*options: Any) -> int:
        trainer = build_trainer(tiny(*CACHED, "topk", "KD.TEACHER.CACHE_TOPK", 5, *options), process)
        calls = []
        trainer.task.teacher.register_forward_hook(lambda *_: calls.append(1))
        trainer.run()
        return len(calls)

    folder = ["KD.TEACHER.CACHE_DIR", tmp_path / "crops"]
    assert passes(*folder) == 8 and passes(*folder) == 0
    assert passes("KD.TEACHER.CACHE_DIR", tmp_path / "still", "DATA.AUGMENTATION", "none", "DATA.SHUFFLE", False) == 4
    repeated = ["KD.TEACHER.CACHE_DIR", tmp_path / "one", "DATA.AUGMENTATION_EPOCHS", 1, "DATA.SHUFFLE", False]
    assert passes(*repeated) == 4
    assert json.loads((tmp_path / "still" / "meta.json").read_text())["seed"] is None  # nothing is random there


def test_two_views_at_once_are_read_too_and_training_with_one_reads_the_weak_one(
    tiny: Callable, process: Process, tmp_path: Path
) -> None:
    def passes(*options: Any) -> int:
        trainer = build_trainer(tiny("KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", tmp_path, *options), process)
        calls = []
        trainer.task.teacher.register_forward_hook(lambda *_: calls.append(1))
        trainer.run()
        return len(calls)

    two = ["KD.LOSS.NAME", "crld", "DATA.VIEWS", 2]
    assert passes(*two) == 16 and passes(*two, "DATA.VIEWS_AT_ONCE", True) == 0 == passes("KD.LOSS.NAME", "dkd")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["SEED", 1], "seed"),
        (["DATA.AUGMENTATION", "cifar"], "augmentation"),
        (["DATA.TRAIN_IMAGES", 48], "num_images"),
        (["MODEL.MEAN", "[0.1, 0.1, 0.1]"], "student input"),
        (["KD.TEACHER.MEAN", "[0.1, 0.1, 0.1]"], "teacher input"),
        (["SOLVER.AMP.ENABLED", True], "precision"),
        (["SOLVER.EPOCHS", 3], "epochs"),
    ],
)
def test_a_cache_is_of_one_teacher_data_set_and_augmentation(
    options: list, what: str, tiny: Callable, process: Process, tmp_path: Path
) -> None:
    folder = ["KD.TEACHER.CACHE_DIR", tmp_path / "cache"]
    build_trainer(tiny(*CACHED, "full", *folder), process)
    with pytest.raises(UserError, match=rf"is a cache of another {what} "):
        build_trainer(tiny(*CACHED, "full", *folder, *options), process)


def test_images_that_do_not_come_again_are_not_cached(tiny: Callable, process: Process) -> None:
    for options, reason in (
        (["DATA.REPRODUCIBLE", False], "DATA.REPRODUCIBLE is False"),
        (["SOLVER.MIXUP.ALPHA", 0.2, "KD.LOSS.NAME", "gdkd"], "SOLVER.MIXUP mixes images at random"),
    ):
        with pytest.raises(UserError, match=f"keeps logits of images that come again, and {reason}"):
            train(tiny(*CACHED, "full", *options), process)


def test_another_file_of_a_folder_makes_another_data_set_wherever_the_folder_is(tmp_path: Path) -> None:
    """Also one that is not among the few images that are looked at."""
    found = []
    for folder, names in (("a", range(40)), ("b", range(40)), ("c", [*range(39), 77])):
        samples = [(str(tmp_path / folder / "cat" / f"{name}.png"), 0) for name in names]
        for path, _ in samples:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (2, 2)).save(path)
        found.append(fingerprint(ImageList(samples, ["cat"])))
    assert found[0] == found[1] != found[2]
    for wrap in (SkipsUnreadable, lambda data: EveryNth(data, 30), lambda data: AllButEveryNth(data, 5)):
        found = []
        for folder, second in (("a", 1), ("c", 77)):
            samples = [(str(tmp_path / folder / "cat" / f"{name}.png"), 0) for name in (0, second, *range(2, 39))]
            found.append(fingerprint(wrap(ImageList(samples, ["cat"]))))
        assert found[0] != found[1]
