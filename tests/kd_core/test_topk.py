"""The dynamic top-k mask and its schedule."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from kd_core.losses import AEKTLoss, DKDLoss, GDKD3Loss, GDKDLoss, KDLoss
from kd_core.topk import TopKSchedule, masked_nckd, top_nontarget_classes

NO_MASK = TopKSchedule(start=1.0, plateau=1.0)


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_the_share_goes_from_five_percent_over_the_plateau_to_all() -> None:
    schedule = TopKSchedule()
    shares = [schedule.share(progress) for progress in (0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6, 1.0)]
    assert shares == pytest.approx([0.05, 0.275, 0.5, 0.5, 0.5, 0.75, 1.0])
    assert schedule.share(None) == 1.0


def test_k_counts_the_non_target_classes() -> None:
    schedule = TopKSchedule()
    assert [schedule.k(progress, 101) for progress in (0.0, 0.5, 1.0, None)] == [5, 50, 100, 100]
    assert [schedule.k(progress, 1001) for progress in (0.0, 0.5, 1.0)] == [50, 500, 1000]


def test_k_is_at_least_two_and_never_more_than_there_are() -> None:
    schedule = TopKSchedule()
    assert [schedule.k(0.0, classes) for classes in (2, 3, 4, 20, 41, 42)] == [1, 2, 2, 2, 2, 3]


def test_k_is_not_rounded_up_by_a_floating_point_error() -> None:
    assert 0.07 * 100 > 7
    assert TopKSchedule(0.07, 0.07).k(0.0, 101) == 7


@pytest.mark.parametrize("phases", [(0.3, 0.3, 0.4), (0.2, 0.3, 0.1), (0.0, 0.0, 1.0), (0.5, 0, 0), (0, 0, 0)])
def test_k_never_falls_and_all_classes_are_in_when_the_phases_are_over(phases: tuple[float, float, float]) -> None:
    schedule = TopKSchedule(phases=phases)
    ks = [schedule.k(step / 1000, 101) for step in range(1001)]
    assert all(a <= b for a, b in itertools.pairwise(ks))
    assert ks.index(100) <= round(1000 * sum(phases))
    assert ks[-1] == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0.6}, "0 <= start <= plateau <= 1, not start 0.6, plateau 0.5"),
        ({"plateau": 1.2}, "0 <= start <= plateau <= 1, not start 0.05, plateau 1.2"),
        ({"phases": (0.5, 0.5)}, r"three lengths >= 0 that add up to 1 or less, not \(0.5, 0.5\)"),
        ({"phases": (0.5, 0.5, 0.5)}, r"three lengths >= 0 that add up to 1 or less, not \(0.5, 0.5, 0.5\)"),
        ({"phases": (-0.1, 0.5, 0.5)}, r"three lengths >= 0 that add up to 1 or less, not \(-0.1, 0.5, 0.5\)"),
        ({"phases": (0.3, float("nan"), 0.3)}, r"three lengths >= 0 that add up to 1 or less, not \(0.3, nan, 0.3\)"),
        ({"phases": ["1/3", "1/3", "1/3"]}, r"three lengths >= 0 .*, not \['1/3', '1/3', '1/3'\]"),
        ({"phases": 0.3}, r"three lengths >= 0 that add up to 1 or less, not 0.3"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopKSchedule(**options)


def test_the_kept_classes_are_the_teacher_s_best_without_the_target() -> None:
    teacher = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    kept = top_nontarget_classes(teacher, torch.tensor([0, 4]), 2)
    assert kept.sort(1).values.tolist() == [[1, 2], [0, 1]]


def test_masked_nckd_compares_renormalised_distributions_over_the_same_classes() -> None:
    student, teacher, target = batch()
    for k in (2, 7, 20):
        expected = []
        for row in range(len(target)):
            others = [c for c in range(21) if c != target[row]]
            kept = sorted(others, key=lambda c, row=row: -teacher[row, c].item())[:k]
            p, q = (side[row, kept].div(3.0).softmax(0) for side in (teacher, student))
            expected.append((p * (p / q).log()).sum())
        value = masked_nckd(student, teacher, target, k, 3.0)
        torch.testing.assert_close(value, torch.stack(expected))
        gradients = (torch.autograd.grad(v.sum(), student)[0] for v in (value, torch.stack(expected)))
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, AEKTLoss])
def test_a_mask_that_admits_all_classes_is_no_mask(make: type[nn.Module]) -> None:
    student, teacher, target = batch()
    plain = make()(student, teacher, target, 0.0)
    assert make(topk=NO_MASK)(student, teacher, target, 0.0) == plain
    assert make(topk=TopKSchedule())(student, teacher, target, None) == plain
    assert make(topk=TopKSchedule())(student, teacher, target, 0.0) != plain


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, AEKTLoss])
def test_the_mask_touches_the_non_target_term_alone(make: type[nn.Module]) -> None:
    student, teacher, target = batch()
    (plain_target, _), (target_term, other) = (
        make(topk=topk)(student, teacher, target, 0.0).values() for topk in (None, TopKSchedule())
    )
    assert target_term == plain_target
    gradient = torch.autograd.grad(other, student)[0]
    assert ((gradient != 0).sum(1) == 2).all()  # K = 2 of 20 classes
    assert gradient.gather(1, target[:, None]).count_nonzero() == 0


def test_masked_kd_weights_each_row_by_the_teacher_s_non_target_mass() -> None:
    student, teacher, target = batch()
    loss = KDLoss(topk=TopKSchedule(0.5), temperature=2.0)
    rest = 1 - (teacher / 2).softmax(1).gather(1, target[:, None])[:, 0]
    expected = 4 * (rest * masked_nckd(student, teacher, target, 10, 2.0)).mean()
    torch.testing.assert_close(loss(student, teacher, target, 0.0)["nckd"], expected)


@pytest.mark.parametrize("make", [GDKDLoss, GDKD3Loss])
def test_a_loss_without_a_non_target_term_takes_no_mask(make: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=f"{make.__name__} has no non-target term for a top-k mask: leave topk out"):
        make(topk=TopKSchedule())
