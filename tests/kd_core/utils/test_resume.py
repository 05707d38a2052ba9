"""What `--resume` refuses: any difference but those listed."""

import pytest
from fvcore.common.config import CfgNode

from kd_core.utils.errors import UserError
from kd_core.utils.resume import check_same_run


def config(**keys) -> CfgNode:
    return CfgNode({"LOSS": {"NAME": "kd", "T": 4.0}, "STEPS": (6, 8), "OUTPUT": "a", "LOG": {"PERIOD": 1}} | keys)


def check(saved, now):
    check_same_run(saved, now, config(), ("OUTPUT", "LOG"), "the run")


def test_a_key_of_another_value_is_named_with_both():
    message = r"--resume: the run was started with LOSS.NAME 'dkd', now it is 'kd'; that would mix two runs"
    with pytest.raises(UserError, match=message):
        check({"LOSS": {"NAME": "dkd", "T": 4.0}}, config())
    with pytest.raises(UserError, match=r"LOSS.T 1.0, now it is 4.0 \(and 1 more keys differ\)"):
        check({"STEPS": [6], "LOSS": {"T": 1.0}}, config())


def test_keys_and_groups_that_may_differ_are_passed_over():
    check({"OUTPUT": "b", "LOG": {"PERIOD": 2}, "STEPS": [6, 8]}, config())


def test_a_key_added_since_counts_as_its_default_and_a_key_removed_since_not_at_all():
    check({"REMOVED": 1, "LOSS": {"OLD": {"A": 1}}}, config())
    with pytest.raises(UserError, match=r"STEPS \[6, 8\], now it is \[5\]"):
        check({}, config(STEPS=(5,)))


def test_without_defaults_a_key_that_was_added_or_removed_since_differs():
    with pytest.raises(UserError, match=r"A.B None, now it is 4"):
        check_same_run({}, {"A": {"B": 4}}, None, (), "the run")
    with pytest.raises(UserError, match=r"A 1, now it is None"):
        check_same_run({"A": 1}, {}, None, (), "the run")
    check_same_run({"LOG": {"A": 1}}, {"LOG": {"B": 1}}, None, ("LOG",), "the run")
