"""benchmarks/kd_cls_step.py times what it says, on a small pair of networks."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import kd_cls_step

    return kd_cls_step


def test_the_floor_is_the_sum_of_its_parts_and_ratios_are_medians_over_rounds(benchmark: ModuleType) -> None:
    parts = {"teacher forward": [1.0, 2.0, 1.0], "student forward": [1.0, 1.0, 1.0], "student backward": [2.0] * 3}
    seconds = parts | {"KD": [4.0, 6.0, 8.0], "DeepKD": [6.0, 6.0, 6.0]}
    rows = {name: found for name, *found in benchmark.table_rows(seconds)}
    assert rows["KD / floor"] == [6000.0, 4000.0, pytest.approx(1.2), 1.05]  # of 1, 1.2 and 2
    assert rows["DeepKD / KD"] == [6000.0, 6000.0, 1.0, 1.35]
    assert rows["DeepKD / floor"][:2] == [6000.0, 6000.0] and len(rows) == 3
    papers = {benchmark.BFLOAT16: [3.0] * 3, "the papers' KD": [6.0] * 3, "the papers' DeepKD": [12.0] * 3}
    papers |= {"MLKD": [3.0] * 3, "the papers' MLKD": [6.0] * 3, "CRLD": [3.0] * 3, "the papers' CRLD": [4.0] * 3}
    peers = {name: found for name, *_, found, _ in benchmark.table_rows(seconds | papers)}
    assert peers["DeepKD / the papers' DeepKD"] == peers[f"{benchmark.BFLOAT16} / the papers' KD"] == 0.5
    assert peers["MLKD / the papers' MLKD"] == 0.5 and peers["CRLD / the papers' CRLD"] == 0.75
    assert len(peers) == 9


def test_a_step_trains_on_the_whole_batch_at_learning_rate_0(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(benchmark, "BATCH", 4)
    words = ["MODEL.NAME", "cifar_resnet8", "KD.TEACHER.NAME", "cifar_resnet8", "SOLVER.IMS_PER_BATCH", "4"]
    read = benchmark.load_cfg
    monkeypatch.setattr(benchmark, "load_cfg", lambda path, given: read(path, [*given, *words]))
    step = benchmark.step_of("deepkd_kd", str(tmp_path))
    weight = step.task.trainable_module.model.fc.weight
    before = weight.detach().clone()
    step()
    assert step.trainer.meters.images == 4 and torch.equal(weight, before)
    assert step.teacher_forward().shape == (4, 100) and step.student_backward() > 0
    assert all(p.grad is None or not p.grad.any() for p in step.task.trainable_module.parameters())
