"""One kill of each kind by `kill_and_resume.py`, which does any number of times, and of every architecture.

`engine/test_two_ranks.py` resumes the other architectures.
"""

from helpers import HELPERS, forked

SCRIPT = HELPERS / "kill_and_resume.py"


def test_killed_in_the_middle_of_iterations_and_of_writes_it_ends_to_the_bit_as_an_undisturbed_run():
    done = forked.run([SCRIPT, "--times", "1", "--seed", "1"], timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "rcnn: 1 of 1 killed in the middle of an iteration ended to the bit" in done.stdout
    assert "rcnn: 1 of 1 killed in the middle of a write ended to the bit" in done.stdout
