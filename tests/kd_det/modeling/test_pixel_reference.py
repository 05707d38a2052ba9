"""DKD and GDKD of maps beside a slow reference, pixel by pixel in float64, written from the papers' formulas."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kd_core import DKDLoss, GDKDLoss
from kd_det.modeling.pixels import PixelMap, PixelOptions, pixel_rows


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def slow_dkd(student: Tensor, teacher: Tensor, label: int) -> Tensor:
    """α 1, β 2, T 1 of one pixel: TCKD of (target, the rest), NCKD of the renormalised rest."""
    p, q = teacher.softmax(0), student.softmax(0)
    others = torch.arange(len(p)) != label
    binary = divergence(torch.stack([p[label], 1 - p[label]]), torch.stack([q[label], 1 - q[label]]))
    return binary + 2 * divergence(p[others] / (1 - p[label]), q[others] / (1 - q[label]))


def slow_gdkd(student: Tensor, teacher: Tensor, _: int) -> Tensor:
    """w 1, 1, 2; k 3; T 1 of one pixel: the teacher's three largest classes, and the rest."""
    p, q = teacher.softmax(0), student.softmax(0)
    top = torch.zeros(len(p), dtype=torch.bool)
    top[teacher.topk(3).indices] = True
    masses = [torch.stack([x[top].sum(), x[~top].sum()]) for x in (p, q)]
    within = [divergence(p[group] / p[group].sum(), q[group] / q[group].sum()) for group in (top, ~top)]
    return divergence(*masses) + within[0] + 2 * within[1]


@pytest.mark.parametrize(
    ("loss", "slow"),
    [
        (DKDLoss(1.0, 2.0, temperature=1.0), slow_dkd),
        (GDKDLoss(1.0, 1.0, 2.0, k=3, temperature=1.0), slow_gdkd),
    ],
    ids=["dkd", "gdkd"],
)
def test_value_and_gradient_of_a_map_are_those_of_the_formulas_pixel_by_pixel(loss, slow):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, 2, 19, 4, 6, generator=generator, dtype=torch.float64)).unbind()
    labels = torch.randint(19, (2, 4, 6), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = 255
    student.requires_grad_()
    kept = pixel_rows(PixelMap(student, labels), teacher, PixelOptions(), 255)
    value = sum(loss(*kept).values())
    (gradient,) = torch.autograd.grad(value, student)
    pixels = (labels != 255).nonzero().tolist()
    rows = [slow(student[b, :, y, x], teacher[b, :, y, x], int(labels[b, y, x])) for b, y, x in pixels]
    expected = sum(rows) / len(rows)
    (slow_gradient,) = torch.autograd.grad(expected, student)
    assert_close(value, expected, rtol=0, atol=1e-9)
    assert_close(gradient, slow_gradient, rtol=0, atol=1e-9)
