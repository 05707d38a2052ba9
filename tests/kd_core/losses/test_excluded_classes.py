"""Logits of −inf exclude classes: p = 0, in value and gradient, as a reference says that drops them."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from kd_core.losses import AEKTLoss, DKDLoss, ForegroundBackground, GDKD3Loss, GDKDLoss, KDLoss
from kd_core.partition import Group, decompose
from kd_core.topk import TopKSchedule

ROWS, CLASSES = 12, 9
EXCLUDED = {0: [5], 1: [2, 3, 6], 2: [0, 1, 4, 5], 7: [1], 8: [4, 6]}  # row → classes; their targets are others
LOSSES = {
    "kd": KDLoss,
    "kd topk": lambda **o: KDLoss(topk=TopKSchedule(0.5), **o),
    "kd standardized": lambda **o: KDLoss(standardize=True, **o),
    "kd top-1": lambda **o: KDLoss(partition="teacher_top1", **o),
    "dkd": DKDLoss,
    "dkd topk": lambda **o: DKDLoss(topk=TopKSchedule(0.5), **o),
    "dkd standardized": lambda **o: DKDLoss(standardize=True, **o),
    "gdkd": lambda **o: GDKDLoss(k=3, **o),
    "gdkd auto-k": lambda **o: GDKDLoss(k=3, auto_k=True, **o),
    "gdkd standardized": lambda **o: GDKDLoss(k=3, standardize=True, **o),
    "gdkd3": lambda **o: GDKD3Loss(k=3, **o),
    "aekt": AEKTLoss,
    "aekt topk": lambda **o: AEKTLoss(topk=TopKSchedule(0.5), **o),
    "gdkds": lambda **o: ForegroundBackground(GDKD3Loss(k=3, **o), DKDLoss(**o)),
}
BOTH_SIDES = {
    **LOSSES,
    "gdkd reverse": lambda **o: GDKDLoss(k=3, kl="reverse", **o),
    "gdkd both": lambda **o: GDKDLoss(k=3, kl="both", **o),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
every_loss_on_both_sides = pytest.mark.parametrize("name", BOTH_SIDES)


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(2, ROWS, CLASSES, dtype=torch.float64).mul(3).to(dtype).unbind()
    target = torch.arange(ROWS) % CLASSES
    target[[1, 2]] = torch.tensor([7, 8])  # the background too has excluded classes
    return student.requires_grad_(), teacher, target


def excluded() -> Tensor:
    mask = torch.zeros(ROWS, CLASSES, dtype=torch.bool)
    for row, classes in EXCLUDED.items():
        mask[row, classes] = True
    return mask


def value_and_gradient(terms: dict[str, Tensor], student: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return list(terms.values()), [torch.autograd.grad(term, student, retain_graph=True)[0] for term in terms.values()]


@every_loss_on_both_sides
def test_classes_that_both_sides_exclude_are_as_if_they_were_not_there(name: str) -> None:
    student, teacher, target = batch()
    loss = BOTH_SIDES[name](temperature=2.0)
    for row, classes in EXCLUDED.items():
        if "topk" in name and len(classes) > 1:
            continue  # K is a share of all the classes: half of 8 others and of 7 is 4, of 6 or 5 it is 3
        kept = [c for c in range(CLASSES) if c not in classes]
        sides = [side.detach()[row : row + 1].clone() for side in (student, teacher)]
        small = [side[:, kept] for side in sides]
        label = torch.tensor([kept.index(int(target[row]))])
        for side in sides:
            side[:, classes] = -torch.inf
        whole = value_and_gradient(loss(sides[0].requires_grad_(), sides[1], target[row : row + 1], 0.0), sides[0])
        part = value_and_gradient(loss(small[0].requires_grad_(), small[1], label, 0.0), small[0])
        torch.testing.assert_close(whole[0], part[0])
        for gradient, expected in zip(whole[1], part[1], strict=True):
            torch.testing.assert_close(gradient[:, kept], expected)
            assert gradient[:, classes].count_nonzero() == 0


@every_loss
def test_a_class_that_the_teacher_alone_excludes_is_the_limit_of_a_falling_logit(name: str) -> None:
    student, teacher, target = batch()
    loss = LOSSES[name](temperature=2.0)
    gone, falling = teacher.masked_fill(excluded(), -torch.inf), teacher.masked_fill(excluded(), -1e4)
    terms = loss(student, gone, target, 0.3)
    assert all(term.isfinite() for term in terms.values())
    gradients = value_and_gradient(terms, student)[1]
    assert all(gradient.isfinite().all() for gradient in gradients)
    if "standardized" not in name and "auto-k" not in name:  # those read the falling logit itself
        expected = value_and_gradient(loss(student, falling, target, 0.3), student)
        torch.testing.assert_close(list(terms.values()), expected[0])
        torch.testing.assert_close(gradients, expected[1])


@every_loss
def test_gradcheck_where_classes_are_excluded(name: str) -> None:
    student, teacher, target = batch()
    teacher = teacher.masked_fill(excluded(), -torch.inf)
    loss = LOSSES[name](temperature=2.0)
    if name.startswith("aekt"):  # its ratio is a constant to the gradient by definition, which numbers cannot see
        loss.explicit = lambda parts: parts.mass
    on_both = excluded() & (torch.arange(ROWS)[:, None] < 2)  # in two rows the student excludes them too
    assert gradcheck(
        lambda z: tuple(loss(z.masked_fill(on_both, -torch.inf), teacher, target, 0.3).values()), (student,)
    )


@pytest.mark.parametrize("student_too", [False, True])
def test_kd_is_torchs_kl_div_wherever_that_gives_a_number(student_too: bool) -> None:
    student, teacher, target = batch()
    teacher = teacher.masked_fill(excluded(), -torch.inf)
    seen = student.masked_fill(excluded(), -1e3) if student_too else student
    whole = F.kl_div((seen / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    if student_too:
        seen = student.masked_fill(excluded(), -torch.inf)
    total = sum(KDLoss()(seen, teacher, target).values())
    torch.testing.assert_close(total, whole)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (total, whole))
    torch.testing.assert_close(ours, theirs)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_half_precision_give_the_numbers_of_float32(name: str, dtype: torch.dtype) -> None:
    student, teacher, target = batch(dtype)
    teacher = teacher.masked_fill(excluded(), -torch.inf)
    wide = student.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype):
        narrow = value_and_gradient(LOSSES[name]()(student, teacher, target, 0.3), student)
    expected = value_and_gradient(LOSSES[name]()(wide, teacher.float(), target, 0.3), wide)
    torch.testing.assert_close(narrow[0], expected[0])
    torch.testing.assert_close(narrow[1], [gradient.to(dtype) for gradient in expected[1]])


@every_loss
def test_a_target_that_the_teacher_excludes_and_rows_with_one_class_left_are_finite(name: str) -> None:
    student, teacher, target = batch()
    teacher[3, target[3]] = -torch.inf  # p_t = 0
    teacher[4, [c for c in range(CLASSES) if c != target[4]]] = -torch.inf  # p_t = 1, no other class
    teacher[5, [c for c in range(CLASSES) if c != 0]] = -torch.inf  # only a class that is not the target
    for seen in (student, student.masked_fill(teacher == -torch.inf, -torch.inf)):
        terms = LOSSES[name]()(seen, teacher, target, 0.3)
        assert all(term.isfinite() and term >= 0 for term in terms.values())
        assert torch.autograd.grad(sum(terms.values()), student)[0].isfinite().all()


def test_such_rows_have_the_divergence_of_the_definition() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64),
        torch.tensor([[0.0, -torch.inf, -torch.inf]]),
    )
    log_q = student.log_softmax(1)[0]
    terms = KDLoss(1.0)(student, teacher, torch.tensor([0]))
    assert terms["tckd"].item() == pytest.approx(-log_q[0].item()) and terms["nckd"].item() == 0
    terms = KDLoss(1.0)(student, teacher, torch.tensor([1]))  # p_t = 0, so all of it lies in the rest
    rest = -math.log1p(-log_q[1].exp().item())
    assert terms["tckd"].item() == pytest.approx(rest)
    assert sum(terms.values()).item() == pytest.approx(-log_q[0].item())


@pytest.mark.parametrize("index", [[[0, 1]], [[4, 5]]])
def test_a_group_that_the_teacher_leaves_empty_adds_no_divergence_and_no_gradient(index: list[list[int]]) -> None:
    student, teacher = torch.randn(2, 1, 6, dtype=torch.float64).unbind()
    student.requires_grad_()
    teacher[:, index[0]] = -torch.inf
    parts = decompose(student, teacher, [Group(torch.tensor(index))])
    assert parts.within[0].item() == 0
    assert torch.autograd.grad(parts.within[0].sum(), student, retain_graph=True)[0].count_nonzero() == 0
    expected = -torch.log1p(-student.softmax(1)[:, index[0]].sum(1))
    torch.testing.assert_close(parts.mass, expected)
    gradients = [torch.autograd.grad(value.sum(), student)[0] for value in (parts.mass, expected)]
    torch.testing.assert_close(*gradients)


def test_standardized_rows_take_mean_and_spread_of_the_classes_that_are_left() -> None:
    student, teacher, target = batch()
    row, classes = 1, EXCLUDED[1]
    teacher = teacher.masked_fill(excluded(), -torch.inf)
    kept = [c for c in range(CLASSES) if c not in classes]
    z = torch.full((1, CLASSES), -torch.inf, dtype=torch.float64)
    z[0, kept] = (teacher[row, kept] - teacher[row, kept].mean()) / teacher[row, kept].std()
    z_student = (student[row] - student[row].mean()) / student[row].std()
    expected = F.kl_div((z_student / 2).log_softmax(0)[None], (z / 2).softmax(1), reduction="batchmean") * 4
    rows = student[row : row + 1], teacher[row : row + 1], target[row : row + 1]
    total = sum(KDLoss(2.0, standardize=True)(*rows).values())
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(value, student)[0] for value in (total, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_mask_never_keeps_a_class_that_the_teacher_excludes() -> None:
    student, teacher, _ = batch()
    teacher[:, 3:] = -torch.inf  # two others are left where the target is one of the first three
    target = torch.arange(ROWS) % 3
    nckd = DKDLoss(topk=TopKSchedule(0.5), temperature=2.0)(student, teacher, target, 0.0)["nckd"]
    rows = []
    for row, label in enumerate(target.tolist()):
        kept = [c for c in range(3) if c != label]
        p, q = (side[row, kept].div(2).softmax(0) for side in (teacher, student))
        rows.append((p * (p / q).log()).sum())
    torch.testing.assert_close(nckd, 8 * 4 * torch.stack(rows).mean())


@every_loss
def test_a_class_that_only_the_student_excludes_is_an_error_that_says_why(name: str) -> None:
    student, teacher, target = batch()
    student, top = student.detach().clone(), int(teacher[3].argmax())
    student[3, top] = -torch.inf
    message = (
        rf"student_logits are -inf for class {top} where teacher_logits are not: "
        r"KL\(teacher \|\| student\) is \+inf by definition; exclude a class on both sides or on neither"
    )
    with pytest.raises(ValueError, match=message):
        LOSSES[name]()(student, teacher, target)
    unchecked = sum(LOSSES[name](validate=False)(student, teacher, target).values())
    assert unchecked == torch.inf


def test_the_reverse_divergence_of_a_class_that_only_the_teacher_excludes_is_an_error_too() -> None:
    student, teacher, target = batch()
    teacher[3, int(teacher[3].argmin())] = -torch.inf
    for kl in ("reverse", "both"):
        with pytest.raises(ValueError, match=r"the reverse KL\(student \|\| teacher\) is \+inf by definition"):
            GDKDLoss(k=3, kl=kl)(student, teacher, target)
        assert GDKDLoss(k=3, kl=kl, validate=False)(student, teacher, target)["within_rest"] == torch.inf


def test_a_row_without_any_class_is_an_error() -> None:
    student, teacher, target = batch()
    teacher[2] = -torch.inf
    with pytest.raises(ValueError, match="teacher_logits have a row of -inf only: no class has a probability"):
        KDLoss()(student, teacher, target)


@every_loss_on_both_sides
def test_a_wrong_number_is_not_hidden_among_them(name: str) -> None:
    for side in (0, 1):
        inputs = list(batch())
        inputs[0] = inputs[0].detach().masked_fill(excluded(), -torch.inf)
        inputs[1] = inputs[1].masked_fill(excluded(), -torch.inf)
        inputs[side][1, 0] = torch.nan
        assert sum(BOTH_SIDES[name]()(*inputs, 0.3).values()).isnan()


@pytest.mark.parametrize("kl", ["forward", "reverse", "both"])
def test_a_class_that_one_side_excludes_and_the_other_rounds_to_0_has_no_gradient(kl):
    student = torch.tensor([[4.0, 5.0, 2.0, 3.0, -1e4, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[5.0, 4.0, 3.0, 2.0, -torch.inf, 1.0]], dtype=torch.float64)
    kept = [0, 1, 2, 3, 5]
    found, expected = (
        torch.autograd.grad(sum(GDKDLoss(k=2, kl=kl)(s, t, None).values()), student)[0]
        for s, t in ((student, teacher), (student[:, kept], teacher[:, kept]))
    )
    torch.testing.assert_close(found, expected)


def test_what_is_nan_is_not_told_as_an_excluded_class():
    """The training says that it has diverged."""
    student, teacher = torch.randn(2, 3, 6).unbind()
    student[0, 1], teacher[1, 2] = torch.nan, -torch.inf
    for loss in (KDLoss(), DKDLoss(), GDKDLoss(k=2)):
        assert any(term.isnan() for term in loss(student, teacher, torch.tensor([0, 3, 4])).values())


def test_a_row_of_nan_leaves_the_others_as_they_are():
    student, teacher = torch.randn(2, 3, 6).unbind()
    teacher[1, 0] = -torch.inf  # the target
    target = torch.tensor([2, 0, 1])
    expected = KDLoss(reduction="none")(student, teacher, target)
    teacher = teacher.clone()
    teacher[0] = torch.nan
    found = KDLoss(reduction="none", validate=False)(student, teacher, target)
    for name, rows in found.items():
        torch.testing.assert_close(rows[1:], expected[name][1:])
