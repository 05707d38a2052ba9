"""What ends a command with one line, and what is a bug and keeps its traceback."""

import argparse
import json
from pathlib import Path

import pytest

from kd_core.losses import DKDLoss
from kd_det.config.defaults import kd_defaults, merge_list
from kd_det.engine.launch import end_in_one_line, list_keys


def run(main):
    return end_in_one_line("tool", main, argparse.Namespace())


@pytest.mark.parametrize(
    ("main", "message"),
    [
        (lambda _: merge_list(kd_defaults(), ["SEED"]), "^tool: Overrides come as KEY VALUE pairs"),
        (lambda _: DKDLoss(temperature=0), "^tool: temperature must be above 0"),
        (lambda _: Path("no/such/file").read_text(), r"^tool: \[Errno 2\] No such file or directory: 'no/such/file'"),
    ],
)
def test_errors_made_to_be_read_end_in_one_line(main, message):
    with pytest.raises(SystemExit, match=message) as raised:
        run(main)
    assert "\n" not in raised.value.code


@pytest.mark.parametrize("main", [lambda _: json.loads("{"), lambda _: int("x"), lambda _: {}["x"]])
def test_an_error_of_another_library_or_of_our_own_making_keeps_its_traceback(main):
    with pytest.raises((ValueError, KeyError)):
        run(main)


def test_an_interruption_says_how_to_go_on():
    def interrupted(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="interrupted; --resume goes on from the last checkpoint"):
        run(interrupted)


def test_a_result_comes_through():
    assert run(lambda _: 7) == 7


def test_keys_are_listed_under_their_groups():
    lines = list_keys("", ["SOLVER.DEEPKD", "SEED"]).splitlines()
    assert "SEED -1" in lines and "SOLVER.DEEPKD.DELTA_TOG 0.075" in lines and len(lines) == 4
    with pytest.raises(ValueError, match=r"no keys under SOLVER.DEEP"):
        list_keys("", ["SOLVER.DEEP"])
