"""GDKD, its variants, and the size of the top group drawn from the teacher."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_core.losses import DKDLoss, GDKD3Loss, GDKDLoss, KDLoss
from kd_core.losses.gdkd import auto_top_group


def batch(rows: int = 8, classes: int = 21) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,))


def test_k_1_is_dkd_where_the_teacher_is_right() -> None:
    student, teacher, _ = batch()
    target = teacher.argmax(1)
    gdkd, dkd = GDKDLoss(2.0, 5.0, 3.0, k=1)(student, teacher, target), DKDLoss(2.0, 3.0)(student, teacher, target)
    torch.testing.assert_close(gdkd["mass"], dkd["tckd"])
    torch.testing.assert_close(gdkd["within_rest"], dkd["nckd"])
    assert gdkd["within_top"] == 0
    gradients = (torch.autograd.grad(sum(terms.values()), student)[0] for terms in (gdkd, dkd))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_the_full_divergence_is_mass_plus_teacher_weighted_within_terms_in_every_row(k: int) -> None:
    student, teacher, target = batch()
    for row in range(len(target)):
        one = (student[row : row + 1], teacher[row : row + 1], target[row : row + 1])
        terms = GDKDLoss(1.0, 1.0, 1.0, k, 2.0)(*one)
        top = (teacher[row] / 2).softmax(0).topk(k).values.sum()
        total = terms["mass"] + top * terms["within_top"] + (1 - top) * terms["within_rest"]
        torch.testing.assert_close(total, sum(KDLoss(2.0)(*one).values()))


def test_three_groups_add_up_to_the_full_divergence_too() -> None:
    student, teacher, target = batch(rows=1)
    terms = GDKD3Loss(1.0, 1.0, 1.0, 5, 2.0)(student, teacher, target)
    top = (teacher[0] / 2).softmax(0).topk(5).values
    total = terms["mass"] + top[1:].sum() * terms["within_top"] + (1 - top.sum()) * terms["within_rest"]
    torch.testing.assert_close(total, sum(KDLoss(2.0)(student, teacher, target).values()))


def test_three_groups_with_an_empty_middle_are_dkd_by_the_top_1_and_one_class_more() -> None:
    student, teacher, target = batch()
    terms = GDKD3Loss(k=2)(student, teacher, target)
    assert terms["within_top"] == 0
    assert terms["mass"] > DKDLoss(partition="teacher_top1")(student, teacher, target)["tckd"]


def test_kl_types_act_within_the_groups_alone_and_both_is_their_mean() -> None:
    student, teacher, target = batch()
    forward, reverse, both = (GDKDLoss(kl=kl)(student, teacher, target) for kl in ("forward", "reverse", "both"))
    assert forward["mass"] == reverse["mass"] == both["mass"]
    for term in ("within_top", "within_rest"):
        assert forward[term] != reverse[term]
        torch.testing.assert_close(both[term], (forward[term] + reverse[term]) / 2)


def test_reverse_swaps_student_and_teacher() -> None:
    student, teacher, target = batch()
    teacher = teacher.sort(1).values  # the same top group on both sides
    student = student.sort(1).values
    forward = GDKDLoss(kl="forward")(teacher, student, target)
    reverse = GDKDLoss(kl="reverse")(student, teacher, target)
    for term in ("within_top", "within_rest"):
        torch.testing.assert_close(forward[term], reverse[term])


def test_the_label_is_not_read() -> None:
    student, teacher, target = batch()
    for loss in (GDKDLoss(), GDKD3Loss(), GDKDLoss(auto_k=True)):
        terms = loss(student, teacher, target)
        assert terms == loss(student, teacher, (target + 3) % 21) == loss(student, teacher, None)


def released_auto_k(probabilities: Tensor, cap: int) -> list[int]:
    """Row by row: sort upwards, divide by the cumulative mean, start at the first ratio of 2."""
    sizes = []
    for row in probabilities:
        upwards = row.sort().values
        ratios = [upwards[i] / upwards[: i + 1].mean() for i in range(len(upwards))]
        first = next((i for i, ratio in enumerate(ratios) if ratio >= 2), len(upwards) - 1)
        sizes.append(min(max(len(upwards) - first, 1), cap))
    return sizes


@pytest.mark.parametrize("classes", [3, 10, 100, 130])
@pytest.mark.parametrize("cap", [1, 2, 1000])
def test_auto_k_draws_the_size_of_each_row_s_top_group_from_the_teacher(classes: int, cap: int) -> None:
    cap = min(cap, classes - 1)
    teacher = torch.randn(60, classes, dtype=torch.float64) * torch.linspace(0.1, 6, 60)[:, None]
    top = auto_top_group(teacher, 2.0, cap)
    sizes = top.valid.sum(1)
    assert sizes.tolist() == released_auto_k((teacher / 2).softmax(1), cap)
    assert cap == 1 or classes == 3 or len(set(sizes.tolist())) > 1
    for row, size in enumerate(sizes.tolist()):
        assert set(top.index[row, :size].tolist()) == set(teacher[row].topk(size).indices.tolist())


def test_auto_k_equals_each_row_with_its_own_k() -> None:
    student, teacher, target = batch(classes=30)
    sizes = auto_top_group(teacher, 4.0, 12).valid.sum(1).tolist()
    assert len(set(sizes)) > 2
    rows = [
        GDKDLoss(k=size)(student[i : i + 1], teacher[i : i + 1], target[i : i + 1]) for i, size in enumerate(sizes)
    ]
    together = GDKDLoss(k=12, auto_k=True)(student, teacher, target)
    for term, value in together.items():
        torch.testing.assert_close(value, sum(row[term] for row in rows) / len(rows))
    by_rows = sum(sum(row.values()) for row in rows) / len(rows)
    gradients = (torch.autograd.grad(v, student)[0] for v in (sum(together.values()), by_rows))
    torch.testing.assert_close(*gradients)


def test_ties_in_the_teacher_s_logits_still_give_exactly_k_classes() -> None:
    student, _, target = batch()
    for loss in (GDKDLoss(k=4), GDKD3Loss(k=4), GDKDLoss(k=4, auto_k=True)):
        terms = loss(student, torch.zeros(8, 21, dtype=torch.float64), target)
        assert sum(terms.values()).isfinite()
    top = GDKDLoss(1.0, 1.0, 1.0, 4, 1.0)(student, torch.zeros(8, 21, dtype=torch.float64), target)
    total = top["mass"] + 4 / 21 * top["within_top"] + 17 / 21 * top["within_rest"]
    torch.testing.assert_close(total, -student.log_softmax(1).mean() - torch.tensor(21.0).double().log())


def test_a_top_group_that_leaves_no_rest_is_refused() -> None:
    student, teacher, target = batch(classes=5)
    for loss in (GDKDLoss(k=5), GDKD3Loss(k=5), GDKDLoss(k=9, auto_k=True)):
        with pytest.raises(ValueError, match=f"k is {loss.k}, but it must be below the number of classes, 5"):
            loss(student, teacher, target)


@pytest.mark.parametrize("k", [0, -1, 2.5, "5", True])
def test_k_must_be_a_whole_number(k: object) -> None:
    with pytest.raises(ValueError, match=f"k must be a whole number >= 1, not {k!r}"):
        GDKDLoss(k=k)


def test_gdkd3_needs_two_top_classes_and_gdkd_a_known_kl() -> None:
    with pytest.raises(ValueError, match="k must be a whole number >= 2, not 1"):
        GDKD3Loss(k=1)
    with pytest.raises(ValueError, match="kl must be one of forward, reverse, both, not 'js'"):
        GDKDLoss(kl="js")


def test_the_mass_term_is_the_forward_divergence_of_the_summed_probabilities() -> None:
    student, teacher, target = batch()
    top = teacher.topk(5, 1).indices
    masses = [(side / 4).softmax(1).gather(1, top).sum(1) for side in (teacher, student)]
    p, q = (torch.stack([mass, 1 - mass], 1) for mass in masses)
    expected = 16 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(GDKDLoss()(student, teacher, target)["mass"], expected)
