"""Selecting in rows by numpy finds what torch finds."""

import pytest
import torch

from kd_core.partition_blocks import in_numpy, largest_indices, sort_values

SHAPES = [(1, 2), (7, 81), (5, 1000), (0, 81)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_a_sorted_row_is_torch_s(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(sort_values(logits), logits.sort(1).values)
    assert in_numpy(logits) is (dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_the_largest_are_torch_s_for_every_k(rows: int, classes: int) -> None:
    logits = torch.randn(rows, classes, generator=torch.Generator().manual_seed(1))
    for k in {1, 2, max(classes // 9, 1), classes // 2, classes - 1, classes}:
        found = largest_indices(logits, min(k, classes))
        assert found.shape == (rows, min(k, classes))
        assert torch.equal(found.sort(1).values, logits.topk(min(k, classes), 1).indices.sort(1).values)


def test_excluded_entries_come_last_and_equal_ones_are_counted_once() -> None:
    rows = torch.zeros(3, 20)
    rows[:, 4] = -torch.inf
    found = largest_indices(rows, 19).sort(1).values
    assert found.tolist() == [[i for i in range(20) if i != 4]] * 3
    assert len(set(largest_indices(rows, 7)[0].tolist())) == 7


def test_a_transposed_matrix_is_read_as_it_stands() -> None:
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(2)).t()
    assert torch.equal(sort_values(rows), rows.sort(1).values)
    assert torch.equal(largest_indices(rows, 9).sort(1).values, rows.topk(9, 1).indices.sort(1).values)
