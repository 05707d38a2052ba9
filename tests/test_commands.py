"""How the two training commands end: one line for the user's errors, a traceback for a bug."""

import runpy
import sys
from pathlib import Path

import pytest

from helpers import forked

ROOT = Path(__file__).resolve().parents[1]
DETECTION = [
    str(ROOT / "tools" / "train_net.py"), "--num-gpus", "0", "--config-file", "configs/Digits/dkd.yaml",
    "KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True", "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATASETS.TEST", "()",
    "SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip
CLASSIFICATION = [
    str(ROOT / "kd_cls" / "train.py"), "--config-file", "configs/Digits/cls_dkd.yaml",
    "DEVICE", "cpu", "KD.TEACHER.CONFIG_FILE", "", "KD.TEACHER.NAME", "cifar_resnet8", "KD.TEACHER.ALLOW_RANDOM",
    "True", "DATA.TRAIN_IMAGES", "32", "DATA.VAL_IMAGES", "8", "DATA.INPUT_SIZE", "16", "DATA.NUM_WORKERS", "0",
    "SOLVER.IMS_PER_BATCH", "16", "MODEL.NAME", "cifar_resnet8",
]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "bug", "message"),
    [
        (DETECTION, "zip", "ValueError: zip() argument 2 is shorter"),
        (CLASSIFICATION, "torch", "RuntimeError: inconsistent tensor size"),
    ],
    ids=["train_net", "kd_cls"],
)
def test_a_bug_inside_a_loss_shows_its_traceback(command, bug, message, tmp_path):
    words = [ROOT / "tests" / "helpers" / "broken_loss.py", bug, *command, "KD.LOSS.NAME", "broken"]
    done = forked.run([*words, "OUTPUT_DIR", tmp_path])
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr and "in row_terms" in done.stderr
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (DETECTION, ["--config-file", "no.yaml"], "train_net: --config-file: there is no file no.yaml"),
        (DETECTION, ["KD.LOS.NAME", "kd"], "train_net: the command line: unknown key KD.LOS.NAME; did you mean"),
        (DETECTION, ["MODEL.ROI_HEADS.NUM_CLASSES", "7"], "train_net: DATASETS.TRAIN: digits_train has 10 classes"),
        (CLASSIFICATION, ["--config-file", "no.yaml"], "train.py: --config-file: there is no file no.yaml"),
        (CLASSIFICATION, ["SOLVER.EPOCH", "3"], "train.py: the command line: unknown key SOLVER.EPOCH; did you mean"),
        (CLASSIFICATION, ["KD.LOSS.DKD.BETA", "x"], "train.py: the command line: KD.LOSS.DKD.BETA is 'x', expected a"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(command, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = command[:1] if "--config-file" in words else command
    monkeypatch.setattr(sys, "argv", [*given, *words, "OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    assert ended.value.code.startswith(message) and "\n" not in ended.value.code
