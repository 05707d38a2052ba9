"""A few kills of `kill_and_resume.py`, which the script does any number of times."""

import os
import subprocess
import sys

from helpers import HELPERS

SCRIPT = HELPERS / "kill_and_resume.py"


def test_killed_in_the_middle_of_iterations_and_of_writes_it_ends_to_the_bit_as_an_undisturbed_run():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--times", "3", "--seed", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "3 of 3 killed in the middle of an iteration ended to the bit" in done.stdout
    assert "3 of 3 killed in the middle of a write ended to the bit" in done.stdout
