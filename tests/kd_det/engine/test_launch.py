"""What ends a command with one line, and what is a bug and keeps its traceback."""

import argparse
import json
from pathlib import Path

import pytest

from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError
from kd_det.config import build_box_loss, kd_defaults, merge_list
from kd_det.engine.launch import list_keys, run_in_process


def run(main):
    return run_in_process("tool", main, argparse.Namespace())


def with_temperature_0():
    cfg = kd_defaults()
    merge_list(cfg, ["KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", "0"])
    return cfg


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda _: merge_list(kd_defaults(), ["SEED"]), "^tool: Overrides come as KEY VALUE pairs"),
        (lambda _: build_box_loss(with_temperature_0()), "^tool: KD.LOSS dkd: temperature must be above 0"),
        (lambda _: Path("no/such/file").read_text(), "^tool: no/such/file: No such file or directory"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(main, message):
    with pytest.raises(SystemExit, match=message) as raised:
        run(main)
    assert "\n" not in raised.value.code


@pytest.mark.parametrize("main", [lambda _: json.loads("{"), lambda _: DKDLoss(temperature=0), lambda _: {}["x"]])
def test_a_bug_of_ours_or_of_a_library_keeps_its_traceback(main):
    with pytest.raises((ValueError, KeyError)):
        run(main)


def test_an_interruption_says_how_to_resume():
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted; --resume continues from the last checkpoint"):
        run(interrupted)


def test_a_result_comes_through():
    assert run(lambda _: 7) == 7


def test_keys_are_listed_under_their_groups():
    lines = list_keys("", ["SOLVER.DEEPKD", "SEED"]).splitlines()
    assert "SEED -1" in lines and "SOLVER.DEEPKD.DELTA_TOG 0.075" in lines and len(lines) == 5
    with pytest.raises(UserError, match=r"no keys under SOLVER.DEEP"):
        list_keys("", ["SOLVER.DEEP"])
