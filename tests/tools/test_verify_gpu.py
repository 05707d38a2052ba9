"""tools/verify_gpu.py, by --device cpu: what differs, fails or falls back is told from what is safe."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from fvcore.common.config import CfgNode

from helpers import forked
from kd_cls.config import get_cfg as cls_defaults
from kd_core.utils.compiling import CompiledOrPlain
from kd_core.utils.config import flatten, lookup
from kd_core.utils.errors import UserError
from kd_det.config import kd_defaults

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.parent.name != "Search"]  # tables
CPU = ["--device", "cpu", "--steps", "1", "--rounds", "1"]


@pytest.fixture(scope="module")
def tool(load_tool: Callable):
    return load_tool("verify_gpu")


def test_without_a_gpu_it_says_so_in_one_line_and_ends_with_status_2():
    command = [sys.executable, str(ROOT / "tools/verify_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1 and "no GPU" in done.stderr


def test_a_fast_path_that_equals_its_slow_one_is_safe():
    done = forked.run(["tools/verify_gpu.py", *CPU, "--only", "classifier: KD.TEACHER.FOLD_BN"])
    assert done.returncode == 0 and "classifier: KD.TEACHER.FOLD_BN True: safe" in done.stdout, done.stderr


def test_a_word_that_no_row_has_is_refused(tool):
    with pytest.raises(UserError, match=r"--only FOLDBN: no row has this word; rows: classifier: SOLVER\.CUDA_GRAPH"):
        tool.main(["--device", "cpu", "--only", "OVERLAP", "FOLDBN"])


def test_a_fast_path_that_raises_is_a_row_and_no_end():
    done = forked.run(["tools/verify_gpu.py", *CPU, "--only", "SOLVER.CUDA_GRAPH"])
    out = done.stdout
    assert done.returncode == 1, done.stderr
    assert "classifier: SOLVER.CUDA_GRAPH True: fails: UserError: SOLVER.CUDA_GRAPH True does not go with" in out
    assert "Safe and worth setting here for a classifier: none" in out


def test_no_row_starts_when_the_time_is_up(tool, capsys):
    assert tool.main([*CPU, "--minutes", "0"]) == 3
    rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": not run: time was up")]
    assert len(rows) == sum(not row.cuda_only for row in tool.ROWS)


def make_trace(tool, **changes):
    generator = torch.Generator().manual_seed(0)
    logits = {"student": torch.randn(8, 10, generator=generator), "teacher": torch.randn(8, 10, generator=generator)}
    start = torch.randn(100, generator=generator)
    return replace(tool.Trace(logits, [2.0, 1.0], start, start + 0.1), **changes)


def judge(tool, fast, nudged=None) -> str:
    plain = make_trace(tool)
    differences, noise = (tool.Differences.between(run, plain) for run in (fast, nudged or plain))
    gains = {"float32": {"median": 1.2, "low": 1.1, "slow": 0.01}}
    found = {"differences": vars(differences), "noise": vars(noise), "gains": gains}
    return tool.verdict(tool.Row("detector", "KD.CHANNELS_LAST"), found)


def test_other_logits_losses_or_weights_than_rounding_explains_differ(tool):
    plain = make_trace(tool)
    assert judge(tool, plain) == "safe, worth it in float32"
    other_teacher = plain.logits | {"teacher": plain.logits["teacher"] + 0.01}
    assert judge(tool, make_trace(tool, logits=other_teacher)) == "differs"
    assert judge(tool, make_trace(tool, losses=[2.01, 1.0])) == "differs"
    assert judge(tool, make_trace(tool, losses=[2.0, float("nan")])) == "differs"
    apart = make_trace(tool, end=plain.end + 0.002)
    assert judge(tool, apart) == "differs"
    assert judge(tool, apart, nudged=make_trace(tool, end=plain.end + 0.0005)).startswith("safe")


def test_a_fast_path_that_falls_back_to_the_slow_one_is_noticed(tool):
    def no_compiler(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(no_compiler, RuntimeError("no C++ compiler"), None)

    warned = tool.Warnings()
    assert CompiledOrPlain(torch.sin, "student", backend=no_compiler)(torch.zeros(2)).tolist() == [0.0, 0.0]
    (message,) = warned.messages
    assert "student" in message and "no C++ compiler" in message


def test_no_shipped_config_takes_a_fast_path_that_has_to_be_opted_in(tool):
    # Folded norms are the same function in the same kernels: on by default.
    opted_in = [row for row in tool.ROWS if not row.key.endswith("FOLD_BN")]
    defaults = {"detector": kd_defaults(), "classifier": cls_defaults()}
    assert [row.key for row in opted_in if str(lookup(defaults[row.network], row.key)) != row.off] == []
    slow = {(row.key, row.off) for row in opted_in}
    assert len(opted_in) == 14 and len(CONFIGS) > 300
    for path in CONFIGS:  # every base among them
        own = flatten(CfgNode(yaml.safe_load(path.read_text())))
        assert {(key, str(own[key])) for key in own.keys() & dict(slow)} <= slow, path
