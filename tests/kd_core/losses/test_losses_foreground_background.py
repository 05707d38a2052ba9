"""One loss for the foreground rows of a detector, another for its background rows."""

import pytest
import torch
from torch import Tensor

from kd_core.losses import DKDLoss, ForegroundBackground, GDKD3Loss, KDLoss


def batch(rows: int = 12, classes: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with the background, the last class, as the target of every third row."""
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    target = torch.randint(classes - 1, (rows,))
    target[::3] = classes - 1
    return student.requires_grad_(), teacher, target


def test_equal_parts_are_the_part() -> None:
    student, teacher, target = batch()
    plain = DKDLoss()(student, teacher, target)
    mixed = ForegroundBackground(DKDLoss(), DKDLoss())(student, teacher, target)
    for term in plain:
        torch.testing.assert_close(mixed[f"fg_{term}"] + mixed[f"bg_{term}"], plain[term])
    gradients = (torch.autograd.grad(sum(terms.values()), student)[0] for terms in (mixed, plain))
    torch.testing.assert_close(*gradients)


def test_each_part_sees_its_rows_and_weighs_their_share() -> None:
    student, teacher, target = batch()
    mixed = ForegroundBackground(GDKD3Loss(), DKDLoss(1.0, 0.25))(student, teacher, target)
    background = target == 8
    foreground = GDKD3Loss()(student[~background], teacher[~background], target[~background])
    rest = DKDLoss(1.0, 0.25)(student[background], teacher[background], target[background])
    expected = {f"fg_{k}": v * 8 / 12 for k, v in foreground.items()} | {f"bg_{k}": v * 4 / 12 for k, v in rest.items()}
    assert mixed.keys() == expected.keys()
    for term in expected:
        torch.testing.assert_close(mixed[term], expected[term])


def test_terms_keep_the_streams_of_their_parts() -> None:
    assert ForegroundBackground(GDKD3Loss(), DKDLoss()).streams == {
        "fg_mass": "tcg",
        "fg_within_top": "ncg",
        "fg_within_rest": "ncg",
        "bg_tckd": "tcg",
        "bg_nckd": "ncg",
    }


@pytest.mark.parametrize("only", ["foreground", "background"])
def test_a_side_without_rows_is_zero_with_a_gradient(only: str) -> None:
    student, teacher, _ = batch()
    target = torch.full((12,), 8 if only == "background" else 2)
    terms = ForegroundBackground(KDLoss(), KDLoss())(student, teacher, target)
    absent = "fg" if only == "background" else "bg"
    assert terms[f"{absent}_tckd"] == terms[f"{absent}_nckd"] == 0
    assert torch.autograd.grad(terms[f"{absent}_nckd"], student)[0].count_nonzero() == 0


def test_progress_reaches_both_parts() -> None:
    student, teacher, target = batch()
    terms = ForegroundBackground(KDLoss(warmup=0.5), KDLoss())(student, teacher, target, 0.0)
    assert terms["fg_nckd"] == 0
    assert terms["bg_nckd"] > 0
