"""A few kills of `kill_and_resume.py`, which the script does any number of times."""

import os
import sys

from helpers import HELPERS
from helpers.processes import run

SCRIPT = HELPERS / "kill_and_resume.py"


def test_killed_in_the_middle_of_iterations_and_of_writes_it_ends_to_the_bit_as_an_undisturbed_run():
    command = [sys.executable, SCRIPT, "--times", "3", "--seed", "1"]
    done = run(command, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "3 of 3 killed in the middle of an iteration ended to the bit" in done.stdout
    assert "3 of 3 killed in the middle of a write ended to the bit" in done.stdout
