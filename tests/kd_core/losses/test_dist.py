"""DIST: the released values, and what every loss promises as far as correlations can."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from kd_core.losses import DISTLoss
from kd_core.topk import TopKSchedule

FILE = json.loads((Path(__file__).resolve().parents[2] / "golden" / "companions.json").read_text())


def batch(rows: int = 9, classes: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(2).to(dtype).unbind()
    return student.requires_grad_(), teacher


def gradient_of(terms: dict[str, Tensor], student: Tensor) -> Tensor:
    return torch.autograd.grad(sum(terms.values()), student)[0]


@pytest.mark.parametrize("case", FILE["dist"], ids=lambda case: f"T {case['temperature']}")
def test_value_and_gradient_are_those_of_the_released_code(case: dict) -> None:
    student, teacher = (torch.tensor(FILE["dist_inputs"][s], dtype=torch.float64) for s in ("student", "teacher"))
    student.requires_grad_()
    terms = DISTLoss(case["beta"], case["gamma"], case["temperature"])(student, teacher, None)
    squared = case["temperature"] ** 2
    assert sum(terms.values()).item() / squared == pytest.approx(case["value_over_T2"], abs=1e-9)
    golden = torch.tensor(case["grad"], dtype=torch.float64)
    torch.testing.assert_close(gradient_of(terms, student) / squared, golden, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("teacher", "student"), [("densenet", "lenet"), ("wrn", "densenet")])
def test_real_predictions_give_the_value_and_gradient_norm_of_the_released_code(
    shared_dir: Path, teacher: str, student: str
) -> None:
    folder = shared_dir / "data" / "cifar100-teacher-preds-2k"
    golden = json.loads((folder / "golden_kd_losses.json").read_text())["values"]
    value, norm = golden[f"teacher={teacher} student={student}"]["mmrazor.DISTLoss tau=4 b=1 g=1"]
    files = {"densenet": "densenet-bc-100", "lenet": "lenet-5", "wrn": "wideresnet-16-4"}
    records = [np.load(folder / f"{files[name]}-cifar-100.npz")["predictions"][:64] for name in (student, teacher)]
    logits = [torch.from_numpy(record).double().log() for record in records]
    logits[0].requires_grad_()
    terms = DISTLoss(temperature=4.0)(*logits, None)
    assert sum(terms.values()).item() == pytest.approx(value, rel=1e-10)
    assert gradient_of(terms, logits[0]).norm().item() == pytest.approx(norm, rel=1e-10)


def test_both_terms_are_scalars_in_the_non_target_stream_and_read_no_label() -> None:
    loss = DISTLoss()
    assert loss.streams == {"inter": "ncg", "intra": "ncg"}
    assert not loss.needs_target
    assert all(term.shape == () and term > 0 for term in loss(*batch(), None).values())


def test_gradcheck_of_both_terms() -> None:
    student, teacher = batch()
    assert gradcheck(lambda logits: tuple(DISTLoss(2.0, 0.5, 2.0)(logits, teacher, None).values()), (student,))


def test_rows_whose_teacher_is_the_student_have_next_to_no_loss() -> None:
    student, _ = batch()
    terms = DISTLoss()(student, student.detach().clone(), None)
    assert max(term.item() for term in terms.values()) < 1e-6


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_constant_rows_and_classes_are_finite_and_cost_beta_and_gamma(side: str, dtype: torch.dtype) -> None:
    student, teacher = batch(dtype=dtype)
    flat = torch.full_like(teacher, 3.3)
    inputs = (flat if side != "teacher" else student.detach()), (flat if side != "student" else teacher)
    logits = inputs[0].clone().requires_grad_()
    terms = DISTLoss(2.0, 3.0)(logits, inputs[1], None)
    assert terms["inter"].item() == pytest.approx(2.0)
    assert terms["intra"].item() == pytest.approx(3.0)
    assert gradient_of(terms, logits).count_nonzero() == 0


def test_one_constant_row_leaves_the_gradient_of_the_others_as_it_was() -> None:
    student, teacher = batch()
    both = torch.cat([student.detach(), torch.zeros(1, 7)]).requires_grad_()
    loss = DISTLoss(gamma=0.0)
    gradient = gradient_of(loss(both, torch.cat([teacher, teacher[:1]]), None), both)
    torch.testing.assert_close(gradient[:9] * 10, gradient_of(loss(student, teacher, None), student) * 9)
    assert gradient[9].count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 300.0, 6e4, 1e30])
def test_terms_and_gradients_are_finite_for_logits_of_any_size(dtype: torch.dtype, size: float) -> None:
    largest = min(size, torch.finfo(dtype).max)
    for rows in (1, 2, 9):
        student, teacher = ((2 * torch.rand(rows, 7, dtype=torch.float64) - 1) * largest for _ in range(2))
        student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
        for temperature in (1.0, 4.0):
            terms = DISTLoss(temperature=temperature)(student, teacher, None)
            assert all(term.isfinite() for term in terms.values())
            gradient = gradient_of(terms, student)
            assert gradient.dtype == dtype
            assert gradient.isfinite().all()


def test_a_teacher_s_minus_infinity_is_a_probability_of_zero() -> None:
    student, teacher = batch()
    teacher[:, 2] = -torch.inf
    terms = DISTLoss()(student, teacher, None)
    assert all(term.isfinite() for term in terms.values())
    assert gradient_of(terms, student).isfinite().all()


def test_no_rows_give_zero_with_a_gradient() -> None:
    student, teacher = batch(rows=0)
    terms = DISTLoss()(student, teacher, None)
    assert all(term.item() == 0 for term in terms.values())
    assert gradient_of(terms, student).shape == (0, 7)


def test_a_row_of_weight_zero_takes_no_part() -> None:
    student, teacher = batch()
    weights = torch.tensor([1.0] * 6 + [0.0] * 3)
    weighted = DISTLoss()(student, teacher, None, row_weights=weights)
    alone = DISTLoss()(student[:6], teacher[:6], None)
    torch.testing.assert_close(weighted["inter"], alone["inter"] * 6 / 9)
    torch.testing.assert_close(weighted["intra"], alone["intra"])
    ones = DISTLoss()(student, teacher, None, row_weights=torch.ones(9))
    torch.testing.assert_close(ones, DISTLoss()(student, teacher, None))


def test_no_number_is_read_by_the_host() -> None:
    with FakeTensorMode():  # a CUDA of tensors without numbers, where reading one raises
        student, teacher = torch.empty(2, 9, 7, device="cuda").unbind()
        assert all(term.shape == () for term in DISTLoss()(student, teacher, None).values())


def test_autocast_changes_nothing_and_half_precision_is_computed_in_float32() -> None:
    student, teacher = batch(dtype=torch.bfloat16)
    wide = DISTLoss()(student.detach().float(), teacher.float(), None)
    with torch.autocast("cpu", torch.bfloat16):
        assert DISTLoss()(student, teacher, None) == wide


def test_a_mask_of_the_non_target_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="DISTLoss has no non-target term for a top-k mask"):
        DISTLoss(topk=TopKSchedule())


def test_rows_that_all_have_a_weight_of_0_are_as_none():
    student, teacher = torch.randn(2, 4, 6).unbind()
    student.requires_grad_()
    terms = DISTLoss(gamma=3, temperature=4)(student, teacher, None, row_weights=torch.zeros(4))
    assert terms["inter"] == 0 and terms["intra"] == 0
    assert torch.autograd.grad(sum(terms.values()), student)[0].abs().max() == 0
