"""What is written: whole or not at all, cut at a resume, evenly spaced, counted on the device."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from helpers import forked
from kd_cls.checkpoint.checkpoint import read_checkpoint, read_metadata
from kd_cls.data import EveryNth, create_datasets
from kd_cls.data.build import build_data
from kd_cls.engine.meters import StepMeters
from kd_cls.engine.writers import Writers
from kd_core.utils.errors import UserError

WRITE_FOREVER = """
import sys, torch
from pathlib import Path
from kd_cls.checkpoint.checkpoint import save_checkpoint
for number in range(10**9):
    save_checkpoint({"number": number, "weights": torch.full((400_000,), float(number))}, Path(sys.argv[1]))
    print(number, flush=True)
"""


def test_a_kill_in_the_middle_of_writing_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pth"
    (tmp_path / "writer.py").write_text(WRITE_FOREVER)
    with forked.started_command([tmp_path / "writer.py", path], tmp_path / "said") as writer:
        while not path.exists():
            assert writer.exitcode is None
            time.sleep(0.01)
        for _ in range(5):
            time.sleep(0.02)
            checkpoint = read_checkpoint(path, "--resume")  # while it is being replaced
            assert torch.equal(checkpoint["weights"], torch.full((400_000,), float(checkpoint["number"])))
    checkpoint = read_checkpoint(path, "--resume")
    assert torch.equal(checkpoint["weights"], torch.full((400_000,), float(checkpoint["number"])))


def test_metadata_of_what_is_no_checkpoint_is_empty(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("text")
    torch.save([1], tmp_path / "list.pth")
    for name in ("text.pth", "list.pth", "gone.pth"):
        assert read_metadata(tmp_path / name) == {}


def test_only_the_main_process_writes(tiny: Callable[..., CfgNode], tmp_path: Path) -> None:
    cfg = tiny("OUTPUT_DIR", tmp_path / "other")
    writers = Writers(cfg, 0, 10, is_main=False)
    writers.write({"loss": 1.0}, 1)
    writers.log_progress({"loss": 1.0}, 1)
    writers.advance()
    writers.close()
    assert not (tmp_path / "other").exists()


def test_tensorboard_has_every_scalar(tiny: Callable[..., CfgNode]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = tiny()
    Path(cfg.OUTPUT_DIR).mkdir()
    writers = Writers(cfg, 0, 10, is_main=True)
    writers.write({"loss": 2.5, "val/top1": 50.0}, 3)
    writers.close()
    events = EventAccumulator(cfg.OUTPUT_DIR)
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]
    assert events.Scalars("val/top1")[0].value == 50


def test_a_part_of_a_data_set_is_evenly_spaced(tiny: Callable[..., CfgNode]) -> None:
    whole = create_datasets("digits").train
    part = EveryNth(whole, 100)
    assert len(part) == 100 and part.classes == whole.classes
    assert [part[i][1] for i in (0, 1, 99)] == [whole[i][1] for i in (0, 11, 1186)]
    part.transform = lambda image: image.size
    assert part[0][0] == (32, 32) and whole.transform is part.transform
    data = build_data(tiny())
    assert (len(data.train), len(data.val), data.num_classes) == (64, 33, 10)


def test_held_out_training_images_are_validated_on_and_not_trained_on(tiny: Callable[..., CfgNode]) -> None:
    whole = create_datasets("digits").train
    data = build_data(tiny("DATA.HELD_OUT", 300, "DATA.TRAIN_IMAGES", 0, "DATA.VAL_IMAGES", 0))
    train, val = ([image.tobytes() for image, _ in part] for part in (data.train, data.val))
    assert (len(train), len(val)) == (898, 300)
    assert sorted(train + val) == sorted(image.tobytes() for image, _ in whole)
    data.train.transform = lambda image: image.size
    assert data.train[0][0] == (32, 32) and data.val[0][0].size == (32, 32)
    with pytest.raises(UserError, match=r"DATA.HELD_OUT is 1198, expected 0 \(none\) … 1197"):
        build_data(tiny("DATA.HELD_OUT", 1198))


def test_meters_give_means_over_rows_and_start_again() -> None:
    meters = StepMeters(["task", "tckd"], torch.device("cpu"))
    output = torch.eye(4)
    for value, rows in ((1.0, 4), (3.0, 2)):
        terms = {"task": torch.tensor(value), "tckd": torch.tensor(2 * value), "loss": torch.tensor(0.0)}
        meters.update(terms, output[:rows], torch.tensor([0, 1, 0, 0])[:rows], iteration=1)
    means = meters.read(world_size=1)
    assert means["task"] == pytest.approx(10 / 6) and means["loss"] == pytest.approx(30 / 6)
    assert means["top1"] == pytest.approx(100 * 4 / 6) and meters.images == 0


def test_the_first_iteration_with_a_bad_term_is_remembered() -> None:
    meters = StepMeters(["task", "tckd", "nckd"], torch.device("cpu"))
    for iteration, bad in ((5, None), (6, math.nan), (7, math.inf)):
        terms = {"task": torch.tensor(1.0), "tckd": torch.tensor(bad or 1.0), "nckd": torch.tensor(bad or 1.0)}
        if iteration == 7:
            terms["task"] = torch.tensor(math.nan)
        meters.update(terms, torch.eye(2), torch.tensor([0, 1]), iteration)
    message = r"not finite at iteration 6: tckd, nckd \(learning rate 0.1\).*lower SOLVER.BASE_LR"
    with pytest.raises(FloatingPointError, match=message):
        meters.check(0.1)
