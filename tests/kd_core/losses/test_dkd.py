"""DKD and its partition."""

import pytest
import torch
from torch import Tensor

from kd_core.losses import DKDLoss, KDLoss


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_the_terms_are_those_of_the_definition() -> None:
    student, teacher, target = batch()
    terms = DKDLoss(2.0, 3.0, 4.0)(student, teacher, target)
    tckd, nckd = [], []
    for row, t in enumerate(target.tolist()):
        p, q = (side[row].div(4.0).softmax(0) for side in (teacher, student))
        tckd.append(p[t] * (p[t] / q[t]).log() + (1 - p[t]) * ((1 - p[t]) / (1 - q[t])).log())
        p_hat, q_hat = (torch.cat([side[:t], side[t + 1 :]]) / (1 - side[t]) for side in (p, q))
        nckd.append((p_hat * (p_hat / q_hat).log()).sum())
    torch.testing.assert_close(terms["tckd"], 2.0 * 16 * torch.stack(tckd).mean())
    torch.testing.assert_close(terms["nckd"], 3.0 * 16 * torch.stack(nckd).mean())


def test_kd_is_tckd_plus_the_teacher_s_non_target_mass_times_nckd_in_every_row() -> None:
    student, teacher, target = batch()
    for row in range(len(target)):
        one = (student[row : row + 1], teacher[row : row + 1], target[row : row + 1])
        parts, whole = DKDLoss(1.0, 1.0, 2.0)(*one), KDLoss(2.0)(*one)
        mass = 1 - (teacher[row] / 2).softmax(0)[target[row]]
        torch.testing.assert_close(parts["tckd"] + mass * parts["nckd"], sum(whole.values()))


@pytest.mark.parametrize(("options", "off"), [({"alpha": 0.0}, "tckd"), ({"beta": 0.0}, "nckd")])
def test_a_weight_of_zero_switches_its_term_off(options: dict, off: str) -> None:
    student, teacher, target = batch()
    terms = DKDLoss(**options)(student, teacher, target)
    assert terms[off] == 0
    assert torch.autograd.grad(terms[off], student)[0].count_nonzero() == 0
    assert all(value > 0 for name, value in terms.items() if name != off)


def test_the_teacher_s_top_1_takes_the_place_of_the_label() -> None:
    student, teacher, target = batch()
    by_teacher = DKDLoss(partition="teacher_top1")
    assert by_teacher(student, teacher, target) == DKDLoss()(student, teacher, teacher.argmax(1))
    assert by_teacher(student, teacher, None) == by_teacher(student, teacher, target)


def test_tckd_alone_has_the_published_gradient() -> None:
    student, teacher, target = batch()
    gradient = torch.autograd.grad(DKDLoss(1.0, 0.0, 1.0)(student, teacher, target)["tckd"], student)[0] * 8
    q, p = student.detach().softmax(1), teacher.softmax(1)
    gap = (q - p).gather(1, target[:, None])  # p_t^S − p_t^T
    rest = q / (1 - q.gather(1, target[:, None]))
    torch.testing.assert_close(gradient, (-gap * rest).scatter(1, target[:, None], gap))


def test_nckd_alone_has_the_published_gradient() -> None:
    student, teacher, target = batch()
    gradient = torch.autograd.grad(DKDLoss(0.0, 1.0, 1.0)(student, teacher, target)["nckd"], student)[0] * 8
    others = torch.ones(8, 21).scatter(1, target[:, None], 0).bool()
    q_hat, p_hat = (side[others].view(8, 20).softmax(1) for side in (student.detach(), teacher))
    torch.testing.assert_close(gradient[others].view(8, 20), q_hat - p_hat)
    assert gradient[~others].count_nonzero() == 0


def test_an_unknown_partition_is_refused() -> None:
    with pytest.raises(ValueError, match="partition must be one of target, teacher_top1, not 'top1'"):
        DKDLoss(partition="top1")
    with pytest.raises(ValueError, match="beta must be a number, not 'eight'"):
        DKDLoss(beta="eight")
