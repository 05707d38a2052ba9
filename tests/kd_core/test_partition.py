"""The partition algebra beside a slow, obvious reference."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from kd_core.partition import KL_TYPES, Group, decompose

PARTITIONS = {  # sizes of the listed groups, of 9 classes
    "whole row": (),
    "target": (1,),
    "top-4": (4,),
    "three groups": (1, 3),
    "rest of one class": (2, 6),
}


def logits_and_groups(sizes: tuple[int, ...], rows: int = 5, classes: int = 9) -> tuple[Tensor, Tensor, list[Group]]:
    student, teacher = torch.randn(2, rows, classes, dtype=torch.float64).mul(3).unbind()
    order = torch.rand(rows, classes).argsort(1)
    *listed, _ = order.split([*sizes, classes - sum(sizes)], 1)
    return student, teacher, [Group(index) for index in listed]


def reference(
    student: Tensor, teacher: Tensor, groups: list[Group], temperature: float, kl: str
) -> tuple[Tensor, list[Tensor]]:
    """The definitions, with probabilities and a loop over rows and groups."""
    classes = student.shape[1]
    mass, within = [], []
    for row in range(len(student)):
        p, q = (side[row].div(temperature).softmax(0) for side in (teacher, student))
        sets = [group.index[row].tolist() for group in groups]
        sets.append([c for c in range(classes) if not any(c in listed for listed in sets)])
        mass.append(sum(p[s].sum() * (p[s].sum() / q[s].sum()).log() for s in sets))
        within.append([])
        for s in sets:
            p_hat, q_hat = p[s] / p[s].sum(), q[s] / q[s].sum()
            forward, reverse = (p_hat * (p_hat / q_hat).log()).sum(), (q_hat * (q_hat / p_hat).log()).sum()
            within[-1].append({"forward": forward, "reverse": reverse, "both": (forward + reverse) / 2}[kl])
    return torch.stack(mass), [torch.stack(column) for column in zip(*within, strict=True)]


@pytest.mark.parametrize("kl", KL_TYPES)
@pytest.mark.parametrize("sizes", PARTITIONS.values(), ids=PARTITIONS)
def test_every_part_and_its_gradient_are_those_of_the_definition(sizes: tuple[int, ...], kl: str) -> None:
    student, teacher, groups = logits_and_groups(sizes)
    student.requires_grad_()
    parts = decompose(student, teacher, groups, 2.5, kl)
    mass, within = reference(student, teacher, groups, 2.5, kl)
    for part, expected in zip((parts.mass, *parts.within), (mass, *within), strict=True):
        torch.testing.assert_close(part, expected, rtol=1e-12, atol=1e-14)
        upstream = torch.randn_like(expected)
        gradients = (torch.autograd.grad(value, student, upstream, retain_graph=True)[0] for value in (part, expected))
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("sizes", [(1,), (4,), (1, 3)])
def test_log_masses_are_the_summed_probabilities_and_differentiable(sizes: tuple[int, ...]) -> None:
    student, teacher, groups = logits_and_groups(sizes)
    student.requires_grad_()
    parts = decompose(student, teacher, groups)
    listed = [student.softmax(1).gather(1, group.index).sum(1) for group in groups]
    masses = torch.stack([*listed, 1 - sum(listed)])
    torch.testing.assert_close(parts.log_mass_student.exp(), masses)
    assert not parts.log_mass_teacher.requires_grad
    upstream = torch.randn_like(masses)
    gradients = (torch.autograd.grad(v, student, upstream)[0] for v in (parts.log_mass_student, masses.log()))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("sizes", PARTITIONS.values(), ids=PARTITIONS)
def test_mass_plus_teacher_weighted_parts_is_the_full_divergence_row_by_row(sizes: tuple[int, ...]) -> None:
    student, teacher, groups = logits_and_groups(sizes)
    parts = decompose(student, teacher, groups)
    total = parts.mass + sum(m * within for m, within in zip(parts.log_mass_teacher.exp(), parts.within, strict=True))
    log_p, log_q = teacher.log_softmax(1), student.log_softmax(1)
    torch.testing.assert_close(total, (log_p.exp() * (log_p - log_q)).sum(1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kl", KL_TYPES)
def test_gradcheck_of_all_parts_together(kl: str) -> None:
    student, teacher, groups = logits_and_groups((1, 3))
    student.requires_grad_()

    def parts(logits: Tensor) -> tuple[Tensor, ...]:
        mass, within, log_mass, _ = decompose(logits, teacher, groups, 1.5, kl)
        return mass, *within, log_mass

    assert gradcheck(parts, (student,))


@pytest.mark.parametrize("kl", KL_TYPES)
def test_groups_of_different_sizes_equal_each_row_taken_alone(kl: str) -> None:
    student, teacher, groups = logits_and_groups((4,))
    student.requires_grad_()
    sizes = torch.tensor([1, 2, 3, 4, 2])
    valid = torch.arange(4) < sizes[:, None]
    padded = Group(torch.where(valid, groups[0].index, groups[0].index[:, :1]), valid)
    together = decompose(student, teacher, [padded], kl=kl)
    for row, size in enumerate(sizes.tolist()):
        sides = student[row : row + 1], teacher[row : row + 1]
        alone = decompose(*sides, [Group(groups[0].index[row : row + 1, :size])], kl=kl)
        for whole, part in zip((together.mass, *together.within), (alone.mass, *alone.within), strict=True):
            torch.testing.assert_close(whole[row], part[0])
            gradients = [torch.autograd.grad(v.sum(), student, retain_graph=True)[0] for v in (whole[row], part)]
            torch.testing.assert_close(*gradients)


def test_gradients_of_the_parts_alone_add_up_to_that_of_their_sum() -> None:
    student, teacher, groups = logits_and_groups((1,))
    student.requires_grad_()
    parts = decompose(student, teacher, groups)
    alone = [torch.autograd.grad(part.sum(), student, retain_graph=True)[0] for part in (parts.mass, parts.within[1])]
    together = torch.autograd.grad((parts.mass + parts.within[1]).sum(), student)[0]
    torch.testing.assert_close(alone[0] + alone[1], together)


def test_a_part_of_another_group_sends_no_gradient_to_a_class() -> None:
    student, teacher, groups = logits_and_groups((3,))
    student.requires_grad_()
    gradient = torch.autograd.grad(decompose(student, teacher, groups).within[0].sum(), student)[0]
    inside = gradient.gather(1, groups[0].index)
    assert inside.abs().min() > 0
    assert gradient.abs().sum() == inside.abs().sum()


def test_a_row_far_from_zero_keeps_its_digits_in_float32() -> None:
    student, teacher, groups = logits_and_groups((1,))
    student, teacher = (side.mul(64).round().div(64) for side in (student, teacher))  # exact in float32, shifted too
    exact = decompose(student, teacher, groups)
    shifted = decompose((student + 4096).float(), (teacher - 8192).float(), groups)
    for part, expected in zip((shifted.mass, *shifted.within), (exact.mass, *exact.within), strict=True):
        torch.testing.assert_close(part, expected.float(), rtol=1e-5, atol=1e-6)


def test_the_inputs_are_left_as_they_were() -> None:
    student, teacher, groups = logits_and_groups((2,))
    copies = student.clone(), teacher.clone()
    decompose(student, teacher, groups)
    assert torch.equal(student, copies[0])
    assert torch.equal(teacher, copies[1])


def test_a_wrong_number_in_the_logits_is_not_hidden() -> None:
    student, teacher, groups = logits_and_groups((1,))
    student[2, 4] = torch.nan
    parts = decompose(student, teacher, groups)
    assert parts.mass.isnan().tolist() == [False, False, True, False, False]


def test_backward_does_without_the_graph_of_the_teacher() -> None:
    student, teacher, groups = logits_and_groups((1,))
    teacher.requires_grad_()
    student.requires_grad_()
    decompose(student, teacher, groups).mass.sum().backward()
    assert student.grad is not None
    assert teacher.grad is None
