"""Bytes of the tensors that are alive, counted by storage."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensors(TorchDispatchMode):
    """While active, counts every new storage until it is freed, in backward passes too.

        with LiveTensors() as live:
            losses = model(batch)
            live.bytes, live.peak

    Tensors from before (weights) and their views do not count, nor does memory that an operator frees before it
    returns. The count is exact: an allocator's figure is rounded, and the process's includes everything else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {storage_key(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and storage_key(tensor) not in given:
                self.count(tensor)
        return made

    def count(self, tensor: Tensor) -> None:
        """Count the storage of a new tensor until it is freed."""
        key, storage = storage_key(tensor), tensor.untyped_storage()
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.bytes += self.sizes[key]
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)


def storage_key(tensor: Tensor) -> int:
    """The identity of a tensor's storage, as long as it lives."""
    return tensor.untyped_storage()._cdata
