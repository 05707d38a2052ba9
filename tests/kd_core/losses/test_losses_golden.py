"""Values and gradients that the papers' released code gives, in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kd_core.losses import DistillationLoss, DKDLoss, GDKD3Loss, GDKDLoss, KDLoss

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
FILES = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("kd_losses_a", "kd_losses_b")}
CASES = [
    pytest.param(file, case, id=f"{name[-1]}-{case['method']}-{'-'.join(str(arg) for arg in case['args'].values())}")
    for name, file in FILES.items()
    for case in file["cases"]
]
LOSSES = {
    "kd": KDLoss,
    "dkd": DKDLoss,
    "gdkd": GDKDLoss,
    "gdkd3": GDKD3Loss,
    "dkd_top1": lambda **args: DKDLoss(partition="teacher_top1", **args),
    "kd_standardized": lambda **args: KDLoss(standardize=True, **args),
    "dkd_standardized": lambda **args: DKDLoss(standardize=True, **args),
}
SHARED_ROWS = {
    "mdistiller.kd T=1": KDLoss(1.0),
    "mdistiller.kd T=4": KDLoss(4.0),
    "mdistiller.dkd a=1 b=8 T=4": DKDLoss(1.0, 8.0, 4.0),
    "mdistiller.dkd a=1 b=1 T=1": DKDLoss(1.0, 1.0, 1.0),
    "mdistiller.dkd a=1 b=0 T=4": DKDLoss(1.0, 0.0, 4.0),
    "mdistiller.dkd a=0 b=1 T=4": DKDLoss(0.0, 1.0, 4.0),
    "logit-standardization kd T=2": KDLoss(2.0, standardize=True),
    "gdkd k=5 w0=1 w1=1 w2=8 T=4": GDKDLoss(1.0, 1.0, 8.0, 5, 4.0),
}


def value_and_gradient(
    loss: DistillationLoss, student: Tensor, teacher: Tensor, target: Tensor
) -> tuple[float, Tensor]:
    student = student.clone().requires_grad_()
    value = sum(loss(student, teacher, target).values())
    return value.item(), torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize(("file", "case"), CASES)
def test_value_and_gradient_are_those_of_the_released_code(file: dict, case: dict) -> None:
    student, teacher = (torch.tensor(file[side], dtype=torch.float64) for side in ("student", "teacher"))
    loss = LOSSES[case["method"]](**case["args"])
    value, gradient = value_and_gradient(loss, student, teacher, torch.tensor(file["target"]))
    golden = torch.tensor(case["grad"], dtype=torch.float64)
    assert value == pytest.approx(case["value"], rel=1e-10)
    assert (gradient - golden).norm() <= 1e-10 * golden.norm()


def test_every_golden_method_is_tested() -> None:
    assert {case["method"] for file in FILES.values() for case in file["cases"]} == set(LOSSES)


@pytest.mark.parametrize("row", SHARED_ROWS)
@pytest.mark.parametrize(("teacher", "student"), [("densenet", "lenet"), ("wrn", "densenet")])
def test_real_predictions_give_the_value_and_gradient_norm_of_the_released_code(
    shared_dir: Path, teacher: str, student: str, row: str
) -> None:
    folder = shared_dir / "data" / "cifar100-teacher-preds-2k"
    golden = json.loads((folder / "golden_kd_losses.json").read_text())["values"]
    golden_value, golden_norm = golden[f"teacher={teacher} student={student}"][row]
    files = {"densenet": "densenet-bc-100", "lenet": "lenet-5", "wrn": "wideresnet-16-4"}
    records = [np.load(folder / f"{files[name]}-cifar-100.npz") for name in (student, teacher)]
    logits = [torch.from_numpy(record["predictions"][:64]).double().log() for record in records]
    target = torch.from_numpy(records[0]["ground_truth"][:64])
    value, gradient = value_and_gradient(SHARED_ROWS[row], *logits, target)
    assert value == pytest.approx(golden_value, rel=1e-10)
    assert gradient.norm().item() == pytest.approx(golden_norm, rel=1e-10)
