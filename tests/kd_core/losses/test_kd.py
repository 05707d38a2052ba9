"""KD, decoupled exactly row by row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_core.losses import KDLoss, standardize_logits


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def plain_kd(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    log_q, log_p = (F.log_softmax(side / temperature, 1) for side in (student, teacher))
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2


@pytest.mark.parametrize("classes", [3, 21, 32, 33, 81, 128, 255, 257, 1000])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_two_terms_add_up_to_the_divergence_and_its_gradient(temperature: float, classes: int) -> None:
    student, teacher, target = batch(classes=classes)
    terms = KDLoss(temperature)(student, teacher, target)
    whole = plain_kd(student, teacher, temperature)
    torch.testing.assert_close(sum(terms.values()), whole, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(value, student)[0] for value in (sum(terms.values()), whole))
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-16)


def test_the_sum_does_not_depend_on_which_class_is_the_target() -> None:
    student, teacher, target = batch()
    values = [sum(KDLoss()(student, teacher, (target + shift) % 21).values()) for shift in range(3)]
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close(values[0], values[2])


def test_the_mass_of_each_row_stands_by_its_own_nckd() -> None:
    """The released DeepKD multiplies two means instead, and its terms no longer add up to KD."""
    student, teacher, target = batch()
    rows = [KDLoss()(student[i : i + 1], teacher[i : i + 1], target[i : i + 1])["nckd"] for i in range(8)]
    torch.testing.assert_close(KDLoss()(student, teacher, target)["nckd"], sum(rows) / 8)


def test_decoupling_is_exact_under_standardization_in_every_row() -> None:
    student, teacher, target = batch()
    for row in range(len(target)):
        sides = student[row : row + 1], teacher[row : row + 1]
        terms = KDLoss(2.0, standardize=True)(*sides, target[row : row + 1])
        torch.testing.assert_close(sum(terms.values()), plain_kd(*standardize_logits(*sides), 2.0))


def test_a_confident_model_leaves_the_sum_of_the_terms_finite_where_the_naive_formula_is_not() -> None:
    student, teacher = torch.tensor([[0.0, 200.0, 1.0]], requires_grad=True), torch.tensor([[200.0, 0.0, 1.0]])
    terms = KDLoss(1.0)(student, teacher, torch.tensor([0]))
    assert sum(terms.values()).item() == pytest.approx(200.0)
    assert terms["tckd"].item() == pytest.approx(200.0)
    p_student = student.softmax(1)
    assert not (teacher.softmax(1) * (teacher.softmax(1) / p_student).log()).sum().isfinite()
