"""tools/run_table.py: what is finished is not trained again, and an interruption starts nothing new."""

import os
import signal
import time
from contextlib import AbstractContextManager
from multiprocessing.process import BaseProcess
from pathlib import Path

from helpers import forked
from helpers.few_digits import few_digits

SHORT = [
    "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", "1", "SOLVER.IMS_PER_BATCH", "1",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "32", "DATALOADER.NUM_WORKERS", "0",
    "REPORT.ENABLED", "False",
]  # fmt: skip


def started_table(output: Path, *words: str) -> AbstractContextManager[BaseProcess]:
    """The command, which trains in processes of its own; its output is in `output`/said.out and .err."""
    entry = few_digits(output, 8)
    few = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", str((entry[0],))]
    command = ["tools/run_table.py", "--output", str(output), *words, *SHORT, *few]
    return forked.started_command(command, output / "said")


def said(output: Path) -> str:
    return "".join((output / f"said.{kind}").read_text() for kind in ("out", "err"))


def test_an_interrupted_table_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    words = ("--methods", "baseline", "deepkd_no_mask", "--seeds", "0", "--rounds", "1")
    finished = tmp_path / "teacher" / "finished"
    with started_table(tmp_path, *words) as interrupted:
        while not (tmp_path / "baseline_seed0" / "config.yaml").is_file() and interrupted.exitcode is None:
            time.sleep(0.05)
        os.killpg(interrupted.pid, signal.SIGINT)
        interrupted.join(60)
    text = said(tmp_path)
    assert interrupted.exitcode == 1 and "[table] interrupted; run the same command again" in text, text
    assert finished.is_file() and not (tmp_path / "deepkd_no_mask_seed0").exists()
    trained, table, old = finished.stat().st_mtime_ns, tmp_path / "table.md", tmp_path / "old_table.md"
    table.write_text("an older table")
    old.hardlink_to(table)
    with started_table(tmp_path, *words) as resumed:
        resumed.join(240)
    text = said(tmp_path)
    lines = table.read_text().splitlines()
    assert old.read_text() == "an older table"  # a whole new file has taken its place
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teacher", "plain", "DeepKD (DKD), no mask"], text
    times = [line.split("|")[-2].strip() for line in lines[3:]]
    assert times[0] == "1.00" and float(times[1]) > 0, text  # one timed iteration says no more
    assert "[demo] teacher: finished before" in text and finished.stat().st_mtime_ns == trained
