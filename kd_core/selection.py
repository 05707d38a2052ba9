"""Sorting and selecting in the rows of a matrix: on CPU by numpy, several times torch's speed."""

import numpy as np
import torch
from torch import Tensor

NUMPY_TYPES = (torch.float32, torch.float64)


def sort_values(rows: Tensor) -> Tensor:
    """Each row upwards. torch sorts indices along with the values, which takes far longer."""
    return torch.from_numpy(np.sort(rows.numpy(), axis=1)) if in_numpy(rows) else rows.sort(1).values


def largest_indices(rows: Tensor, k: int) -> Tensor:
    """(N, k) indices of each row's k largest, in no order.

    numpy partitions a row in a time that k does not change; torch's heap is quicker for a few of many.
    """
    classes = rows.shape[1]
    if in_numpy(rows) and 8 * k > classes > k:
        return torch.from_numpy(np.argpartition(rows.numpy(), classes - k, axis=1)[:, classes - k :])
    return rows.topk(k, 1, sorted=False).indices


def in_numpy(rows: Tensor) -> bool:
    """Whether numpy can read the tensor where it lies."""
    return rows.device.type == "cpu" and rows.dtype in NUMPY_TYPES and not torch.compiler.is_compiling()
