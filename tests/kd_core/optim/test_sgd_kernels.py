"""Which kernel steps, and that both take a learning rate as a number or as a tensor."""

import pytest
import torch
from torch import Tensor

from kd_core.optim.sgd_kernels import same_layout, sgd_


def lists(shape: tuple[int, ...], channels_last: tuple[bool, bool, bool]) -> tuple[list[Tensor], ...]:
    """Two tensors each of θ, g and v, alike but for the memory format."""
    generator = torch.Generator().manual_seed(0)
    formats = [torch.channels_last if last else torch.contiguous_format for last in channels_last]
    return tuple(
        [torch.randn(shape, generator=generator).contiguous(memory_format=layout) for _ in range(2)]
        for layout in formats
    )


def is_fused(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]) -> bool:
    """Whether `sgd_` steps these tensors by torch's fused kernel."""
    with torch.profiler.profile() as profile:
        sgd_(params, grads, buffers, 0.25, 0.9, 0.01, nesterov=False)
    return any("_fused_sgd_" in event.name for event in profile.events())


def test_sides_of_one_do_not_keep_tensors_from_the_fused_kernel() -> None:
    pointwise = torch.randn(8, 4, 1, 1)
    other = pointwise.as_strided(pointwise.shape, (4, 1, 4, 4))  # as channels last counts the same memory
    assert pointwise.stride() != other.stride() and same_layout(pointwise, other)
    assert is_fused([pointwise], [other], [pointwise.clone()])
    wide = torch.randn(8, 4, 3, 3)
    assert not same_layout(wide, wide.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("channels_last", [(False, False, False), (True, False, True), (False, True, True)])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_rate_in_a_tensor_is_the_rate_as_a_number(channels_last: tuple[bool, bool, bool], nesterov: bool) -> None:
    params, grads, buffers = lists((4, 3, 3, 3), channels_last)
    expected = []
    for p, g, v in zip(params, grads, buffers, strict=True):
        decayed = g + 0.01 * p
        moved = 0.9 * v + decayed
        expected.append(p - 0.25 * (decayed + 0.9 * moved if nesterov else moved))
    for rate in (0.25, torch.tensor(0.25)):
        params, grads, buffers = lists((4, 3, 3, 3), channels_last)
        sgd_(params, grads, buffers, rate, 0.9, 0.01, nesterov)
        torch.testing.assert_close(params, expected, check_stride=False)
    assert is_fused(params, grads, buffers) == (len(set(channels_last)) == 1)
