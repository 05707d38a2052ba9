"""The divergence of many binary classifiers: value, gradient, BCKD's weight, digits that do not cancel."""

import pytest
import torch
from torch.testing import assert_close

from kd_det.modeling.sigmoid_loss import BLOCK, BinaryDivergence, BinaryDKDLoss, divergence_and_slope, plain_divergence


def rows(count=7, classes=4):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (4 * torch.randn(count, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(classes + 1, (count,), generator=generator)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_in_blocks_it_is_the_plain_formula_with_its_gradient(gamma):
    count = 2 * (BLOCK // 4) + 3  # two whole blocks and a rest
    student, teacher, target = rows(count)
    upstream = torch.randn(2, count, dtype=torch.float64)
    for temperature in (1.0, 3.0):
        ours = BinaryDivergence.apply(student, teacher, target, temperature, gamma)
        plain = plain_divergence(student, teacher, target, temperature, gamma)
        for value, expected in zip(ours, plain, strict=True):
            assert_close(value, expected, rtol=1e-9, atol=1e-12)
        gradients = [
            torch.autograd.grad(sum((term * up).sum() for term, up in zip(terms, upstream, strict=True)), student)[0]
            for terms in (ours, plain)
        ]
        assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_without_a_weight_it_passes_gradcheck():
    student, teacher, target = rows()
    assert torch.autograd.gradcheck(lambda z: BinaryDivergence.apply(z, teacher, target, 2.0, 0.0), student)


def test_the_weight_is_the_difference_of_the_probabilities_and_passes_no_gradient():
    student, teacher, target = rows()
    difference = (teacher.sigmoid() - student.sigmoid()).detach()
    background = torch.full_like(target, 4)
    own, others = BinaryDivergence.apply(student, teacher, background, 1.0, 1.0)
    kl, _ = divergence_and_slope(student.detach(), teacher)
    assert own.eq(0).all()
    assert_close(others, (difference.abs() * kl).sum(1))
    (gradient,) = torch.autograd.grad(others.sum(), student)
    assert_close(gradient, -difference.abs() * difference)


def test_a_rare_class_keeps_its_digits_in_float32():
    student, teacher = (torch.tensor([[z]]) for z in (-9.0, -9.2))
    expected, slope = divergence_and_slope(student.double(), teacher.double())
    found, found_slope = divergence_and_slope(student, teacher)
    assert_close(found.double(), expected, rtol=2e-3, atol=0)  # 2e-6: a second-order difference of 1e-4
    assert_close(found_slope.double(), slope, rtol=1e-5, atol=0)


def test_without_a_background_logit_a_background_row_has_target_k():
    student, teacher, target = rows()
    dense = BinaryDKDLoss(temperature=1.0, background_logit=False, validate=False)(student, teacher, target)
    column = torch.zeros(len(target), 1, dtype=torch.float64)
    boxes = BinaryDKDLoss(temperature=1.0)(*(torch.cat([z, column], 1) for z in (student, teacher)), target)
    for term, value in boxes.items():
        assert_close(dense[term], value)


def test_no_rows_give_zero_with_a_gradient_and_one_class_is_enough():
    student = torch.zeros(0, 1, requires_grad=True)
    loss = BinaryDKDLoss(background_logit=False, validate=False)
    terms = loss(student, torch.zeros(0, 1), torch.zeros(0, dtype=torch.long))
    sum(terms.values()).backward()
    assert all(term.item() == 0 for term in terms.values()) and student.grad.shape == (0, 1)


def test_half_precision_logits_get_a_gradient_of_their_own_type():
    student, teacher, target = rows()
    half = student.detach().bfloat16().requires_grad_()
    terms = BinaryDKDLoss(background_logit=False, validate=False)(half, teacher.bfloat16(), target)
    assert all(term.dtype == torch.float32 for term in terms.values())
    sum(terms.values()).backward()
    assert half.grad.dtype == torch.bfloat16 and half.grad.isfinite().all()


def test_a_compiled_loss_is_the_eager_one():
    student, teacher, target = rows()
    loss = BinaryDKDLoss(gamma=1.0, background_logit=False, validate=False)
    expected = loss(student, teacher, target)
    loss.compile(backend="aot_eager")
    for term, value in loss(student, teacher, target).items():
        assert_close(value, expected[term])
    assert loss.compiled_terms.is_compiled


def test_a_negative_gamma_is_refused():
    with pytest.raises(ValueError, match="gamma must be 0 or more, not -1"):
        BinaryDKDLoss(gamma=-1.0)
