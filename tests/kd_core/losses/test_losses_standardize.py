"""Logit standardization."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kd_core.losses import DKDLoss, GDKDLoss, KDLoss, standardize_logits


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_rows_get_mean_0_and_the_sample_s_standard_deviation_1() -> None:
    student, teacher, _ = batch()
    for side in standardize_logits(student * 7 + 3, teacher):
        torch.testing.assert_close(side.mean(1), torch.zeros(8).double(), rtol=0, atol=1e-12)
        torch.testing.assert_close(side.std(1), torch.ones(8).double(), rtol=1e-6, atol=0)


def test_value_and_gradient_are_those_of_the_formula() -> None:
    student, teacher, _ = batch()
    expected = (student - student.mean(1, keepdim=True)) / (1e-7 + student.std(1, keepdim=True))
    value, _ = standardize_logits(student, teacher)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    upstream = torch.randn_like(value)
    gradients = (torch.autograd.grad(v, student, upstream)[0] for v in (value, expected))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradcheck(lambda logits: standardize_logits(logits, teacher)[0], (student,))


def test_scale_and_shift_of_either_side_do_not_matter() -> None:
    student, teacher, target = batch()
    loss = DKDLoss(standardize=True)
    plain, moved = loss(student, teacher, target), loss(student * 100 - 7, teacher * 0.1 + 2, target)
    for term in plain:
        torch.testing.assert_close(moved[term], plain[term], rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, GDKDLoss])
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.0, 1e4])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_constant_row_adds_nothing_and_gets_no_gradient(
    make: type, constant: float, side: str, dtype: torch.dtype
) -> None:
    student, teacher, target = batch()
    logits = {"student": student.detach().to(dtype), "teacher": teacher.to(dtype)}
    logits[side][3] = constant
    student = logits["student"].requires_grad_()
    loss = make(standardize=True)
    value = sum(loss(student, logits["teacher"], target).values())
    gradient = torch.autograd.grad(value, student)[0]
    others = [row for row in range(8) if row != 3]
    without = sum(loss(student[others], logits["teacher"][others], target[others]).values()) * 7 / 8
    torch.testing.assert_close(value, without)
    assert gradient[3].count_nonzero() == 0
    assert gradient.isfinite().all()
    assert (gradient[others].abs().sum(1) > 0).all()


def test_a_row_as_large_as_1e30_is_standardized_like_a_small_one() -> None:
    student, teacher, _ = batch()
    small = standardize_logits(student, teacher)
    large = standardize_logits((student * 3e28).float(), (teacher * 3e28).float())
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(b, a.float(), rtol=1e-5, atol=1e-5)


def test_a_small_spread_is_not_taken_for_a_constant_row() -> None:
    student, teacher, _ = batch()
    value, _ = standardize_logits((student * 1e-4).float(), teacher.float())
    torch.testing.assert_close(value.std(1), torch.ones(8), rtol=1e-2, atol=0)


def test_one_outlier_of_many_classes_has_a_finite_gradient_in_float16():
    student, teacher = torch.zeros(1, 1000, dtype=torch.float16), torch.randn(1, 1000).half()
    student[0, 3] = 0.0043
    student.requires_grad_()
    terms = DKDLoss(standardize=True)(student, teacher, torch.tensor([5]))
    assert torch.autograd.grad(sum(terms.values()), student)[0].isfinite().all()
