"""Rows out of maps and sequences."""

import pytest
import torch

from kd_core import DKDLoss, GDKDLoss, KDLoss, flatten_rows


def test_pixels_of_a_map_are_rows_of_its_channels() -> None:
    student, teacher = torch.randn(2, 2, 5, 3, 4).unbind()
    target = torch.randint(5, (2, 3, 4))
    rows = flatten_rows(student, teacher, target)
    expected = [
        (student[b, :, y, x], teacher[b, :, y, x], target[b, y, x])
        for b in range(2)
        for y in range(3)
        for x in range(4)
    ]
    for found, wanted in zip(rows, zip(*expected, strict=True), strict=True):
        assert torch.equal(found, torch.stack(wanted))


def test_tokens_of_a_sequence_are_rows_and_rows_stay_rows() -> None:
    student, teacher = torch.randn(2, 3, 4, 5).unbind()
    target = torch.randint(5, (3, 4))
    found = flatten_rows(student, teacher, target)
    assert torch.equal(found[0], student.reshape(12, 5)) and torch.equal(found[2], target.reshape(12))
    again = flatten_rows(*found)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("shape", [(40, 5), (2, 5, 4, 5), (8, 5, 5)])
def test_ignored_rows_are_gone_with_their_gradient(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, *shape).unbind()
    student.requires_grad_()
    places = (shape[0], *shape[2:]) if len(shape) == 4 else shape[:-1]
    target = torch.randint(5, places)
    ignored = torch.rand(places) < 0.3
    target[ignored] = 255
    rows = flatten_rows(student, teacher, target, ignore_index=255)
    assert len(rows[0]) == len(rows[1]) == len(rows[2]) == (~ignored).sum()
    assert rows[2].max() < 5
    sum(DKDLoss()(*rows).values()).backward()
    gradient = student.grad.movedim(1, -1) if len(shape) == 4 else student.grad
    assert gradient[ignored].count_nonzero() == 0
    assert (gradient[~ignored].abs().sum(-1) > 0).all()


def test_expanded_logits_get_the_gradient_of_every_kept_row_once() -> None:
    logits = torch.tensor([1.0, 2.0], requires_grad=True)
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    target[:, ::2] = 255
    rows, _, _ = flatten_rows(logits.view(1, 2, 1, 1).expand(1, 2, 4, 4), torch.zeros(1, 2, 4, 4), target, 255)
    rows.sum().backward()
    assert logits.grad.tolist() == [8.0, 8.0]


def test_overlapping_windows_get_the_gradient_of_every_kept_row() -> None:
    series = torch.randn(10, requires_grad=True)
    windows, teacher = series.unfold(0, 4, 1), torch.randn(7, 4)
    target = torch.arange(7) % 4
    gradients = []
    for rows in ((windows, teacher, target), flatten_rows(windows, teacher, target, ignore_index=255)):
        gradients.append(torch.autograd.grad(sum(KDLoss()(*rows).values()), series)[0])
    torch.testing.assert_close(*gradients)


def test_a_map_keeps_the_memory_format_of_its_gradient() -> None:
    student = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(5, (2, 3, 4))
    rows = flatten_rows(student, torch.randn(2, 5, 3, 4), target, ignore_index=255)
    sum(KDLoss()(*rows).values()).backward()
    assert student.grad.is_contiguous(memory_format=torch.channels_last)


def test_without_a_target_all_rows_stay() -> None:
    student, teacher = torch.randn(2, 2, 6, 3, 3).unbind()
    rows = flatten_rows(student, teacher, ignore_index=255)
    assert rows[0].shape == rows[1].shape == (18, 6) and rows[2] is None
    assert sum(GDKDLoss()(*rows).values()) > 0


def test_no_rows_left_give_zero() -> None:
    student, teacher = torch.randn(2, 1, 4, 6).unbind()
    rows = flatten_rows(student, teacher, torch.full((1, 4), -100), ignore_index=-100)
    assert sum(KDLoss()(*rows).values()) == 0


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5, 3, 4), (2, 5, 6, 8), (2, 3, 4)), r"teacher_logits are \(2, 5, 6, 8\) but student_logits are"),
        (((2, 5, 3, 4), (2, 5, 3, 4), (2, 4, 3)), r"target must be \(2, 3, 4\) for logits \(2, 5, 3, 4\)"),
        (((2, 7, 5), (2, 7, 5), (2, 5)), r"target must be \(2, 7\) for logits \(2, 7, 5\)"),
        (((5,), (5,), ()), r"logits must be \(N, C\), \(B, C, H, W\) or \(B, L, C\), not \(5,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes: tuple, message: str) -> None:
    student, teacher, target = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        flatten_rows(student, teacher, target.long())


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 7, 5)])
def test_a_loss_that_is_given_a_map_or_a_sequence_names_the_function(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(N, C\), not .*kd_core.rows.flatten_rows makes rows"):
        KDLoss()(torch.zeros(shape), torch.zeros(shape), torch.zeros(2).long())
