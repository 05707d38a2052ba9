"""The table of agreement: what teacher and student say of the same rows, by class."""

import pytest
import torch
from torch.nn import functional as F

from kd_core.utils.report.agreement import agreement_table
from kd_core.utils.report.tables import markdown


def test_agreement_is_counted_by_class_and_kl_is_torchs_own():
    teacher = torch.tensor([[5.0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5]])
    student = torch.tensor([[4.0, 0, 0], [0, 4, 0], [0, 4, 0], [0, 4, 0]])
    target = torch.tensor([0, 0, 1, 1])
    table = agreement_table(teacher, student, target, ["cat", "dog", "bird"], "KD", "images")
    assert [name for name, _ in table.rows] == ["cat", "dog"]  # no row is a bird
    (images, same, theirs, own, divergence), _ = ([cell[0].value for cell in cells] for _, cells in table.rows)
    assert (images, same, theirs, own) == (2, 50, 100, 50)
    expected = F.kl_div(student[:2].log_softmax(1), teacher[:2].log_softmax(1), reduction="batchmean", log_target=True)
    assert divergence == pytest.approx(float(expected))
    assert "50.00" in markdown(table)


def test_a_student_with_the_teachers_logits_agrees_wholly():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    table = agreement_table(logits, logits, torch.arange(50) % 4, list("abcd"), "KD", "objects")
    for _, (count, same, theirs, own, divergence) in table.rows:
        assert same[0].value == 100 and divergence[0].value == 0 and theirs[0].value == own[0].value and count
