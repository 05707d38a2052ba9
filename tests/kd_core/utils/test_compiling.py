"""What falls back from torch.compile to eager: the compiler's own failures, and nothing else."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_core.utils.compiling import CompiledOrPlain, is_compiler_error


def no_compiler(*graph: Any) -> None:
    raise OSError("no C++ compiler")


def no_memory(*graph: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory while tuning kernels")


class Counted:
    """A function that counts its calls and raises `error` in the call of that number."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.error is not None:
            raise self.error
        return 2 * x


def test_a_compiler_that_fails_falls_back_to_eager_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    forward = CompiledOrPlain(lambda x: x + 1, "loss", backend=no_compiler)
    with caplog.at_level(logging.WARNING, "kd_core"):
        assert forward(torch.ones(2)).tolist() == forward(torch.ones(2)).tolist() == [2, 2]
    (message,) = [record.getMessage() for record in caplog.records if record.name == "kd_core.utils.compiling"]
    assert message.startswith("torch.compile of the loss failed (") and message.endswith("; it falls back to eager")


def test_an_out_of_memory_is_raised_also_where_the_compiler_has_wrapped_it() -> None:
    torch._dynamo.reset()
    forward = CompiledOrPlain(lambda x: x + 1, "loss", backend=no_memory)
    with pytest.raises(Exception, match="out of memory while tuning"):
        forward(torch.ones(2))
    assert forward.compiled is not forward.function


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug"), KeyError("no")])
def test_an_error_of_the_function_s_own_run_is_raised_at_once(error: Exception) -> None:
    function = Counted(error)
    forward = CompiledOrPlain(torch.compiler.disable(function), "loss", backend="eager")
    with pytest.raises(type(error)):
        forward(torch.ones(2))
    assert function.calls == 1
    assert forward.compiled is not forward.function


def test_shapes_that_do_not_fit_are_the_function_s_error_and_no_failure_to_compile(
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch._dynamo.reset()
    forward = CompiledOrPlain(torch.nn.Linear(3, 2), "layer", backend="aot_eager")
    with caplog.at_level(logging.WARNING, "kd_core"), pytest.raises(RuntimeError, match="cannot be multiplied"):
        forward(torch.randn(4, 5))
    assert not [record for record in caplog.records if record.name.startswith("kd_core")]
    assert forward(torch.randn(4, 3)).shape == (4, 2)


def test_errors_are_told_apart_by_who_raises_them() -> None:
    from torch._dynamo.exc import BackendCompilerFailed, Unsupported

    assert is_compiler_error(Unsupported("no such operation", ""))
    assert is_compiler_error(BackendCompilerFailed(no_compiler, OSError("no C++ compiler"), None))
    assert not is_compiler_error(BackendCompilerFailed(no_memory, torch.OutOfMemoryError("no memory"), None))
    assert not is_compiler_error(RuntimeError("the model's own"))
