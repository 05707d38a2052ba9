"""Losses on their way to the log."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class HostCopy:
    """Named scalars of a device, copied to the host while the device goes on.

    `.item()` of each would wait for all that is queued. This is one copy, queued where it is made, into pinned memory;
    `read` waits for that copy alone: behind a forward pass, not for the backward pass that was queued since.

    Args:
        scalars: tensors of one device, detached here.
    """

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self.names, self.copied = list(scalars), None
        values = torch.stack([scalar.detach().reshape(()) for scalar in scalars.values()])
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record(torch.cuda.current_stream(values.device))  # which need not be the current device
        else:
            self.values = values

    def read(self) -> dict[str, Tensor]:
        """The scalars, on the CPU."""
        if self.copied is not None:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.unbind(), strict=True))


def total(copies: Sequence[HostCopy]) -> dict[str, Tensor]:
    """The sum of each scalar over the copies that have it."""
    sums: dict[str, Tensor] = {}
    for copy in copies:
        for name, value in copy.read().items():
            sums[name] = sums[name] + value if name in sums else value
    return sums
