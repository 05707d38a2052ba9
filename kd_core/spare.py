"""Memory that is used again from step to step, where nobody else can see it any more."""

import sys

import torch
from torch import Tensor


class SpareTensors:
    """A tensor a parameter, kept for the next step on the CPU.

    There fresh memory costs several times the sum that is written into it (benchmarks/core_optim.py); a GPU's allocator
    has memory at hand, and to keep some would raise the peak. A tensor that anybody still holds, or a view of it, is
    not given out again.
    """

    def __init__(self) -> None:
        self._kept: dict[Tensor, Tensor] = {}

    def keep(self, p: Tensor, t: Tensor) -> None:
        if _use_count is not None:
            self._kept[p] = t

    def take(self, p: Tensor) -> Tensor | None:
        """The tensor kept for `p`, with any content; None where there is none, or where it does not fit."""
        t = self._kept.pop(p, None)
        if t is None or _references(t) != _ALONE or t.shape != p.shape or t.dtype != p.dtype or t.device != p.device:
            return None
        return t


_use_count = getattr(torch._C, "_storage_Use_Count", None)


def _references(t: Tensor) -> tuple[int, int]:
    """Python's references to the tensor, and everybody's to its memory."""
    return sys.getrefcount(t), _use_count(t.untyped_storage()._cdata) if _use_count is not None else 0


def _of_one_owner() -> tuple[int, int]:
    t = torch.empty(1)
    return _references(t)


_ALONE = _of_one_owner()  # counted, since Python's versions count differently
