"""tools/run_table.py: what is finished is not trained again, and an interruption begins nothing new."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "(3,)", "SOLVER.WARMUP_ITERS", "1", "SOLVER.IMS_PER_BATCH", "1",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "32", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


def start(output: Path, *words: str) -> subprocess.Popen:
    """The command, in a session of its own; what it says is in `output`/said."""
    command = [sys.executable, "-W", "ignore", "tools/run_table.py", "--output", str(output), *words, *SHORT]
    with open(output / "said", "w") as said:
        return subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)


def test_an_interrupted_table_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    words = ("--methods", "baseline", "deepkd_no_mask", "--seeds", "0", "--rounds", "1")
    interrupted = start(tmp_path, *words)
    finished = tmp_path / "teacher" / "finished"
    while not (tmp_path / "baseline_seed0" / "config.yaml").is_file() and interrupted.poll() is None:
        time.sleep(0.05)
    os.killpg(interrupted.pid, signal.SIGINT)
    interrupted.wait(timeout=60)
    text = (tmp_path / "said").read_text()
    assert interrupted.returncode == 1 and "[table] interrupted; run the same command again" in text, text
    assert finished.is_file() and not (tmp_path / "deepkd_no_mask_seed0").exists()
    trained = finished.stat().st_mtime_ns
    start(tmp_path, *words).wait(timeout=240)
    text = (tmp_path / "said").read_text()
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teacher", "plain", "DeepKD (DKD), no mask"], text
    assert lines[3].split("|")[-2].strip() == "1.00" and float(lines[4].split("|")[-2]) > 1
    assert "[demo] teacher: finished before" in text and finished.stat().st_mtime_ns == trained
