"""torch.compile that falls back to eager."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

DYNAMO_HINT = "Set TORCHDYNAMO_VERBOSE"  # dynamo ends its errors with a paragraph for torch's developers
COMPILER_PACKAGES = ("torch._dynamo.", "torch._inductor.", "torch._functorch.", "triton.")


class CompiledOrPlain:
    """`function` as torch.compile makes it; or, with one message, `function` itself once a call fails to compile.

    Compilation happens in the first calls, and with it its failures: no C++ compiler, an operation that the backend
    does not know, an input of another kind. Only the compiler's own exceptions fall back to eager. An error of
    `function` itself and an out-of-memory are raised at once.

    Args:
        function: what is compiled: a module, or a function.
        name: of it, for the message.
        log: where the message goes.
        options: torch.compile's: `backend`, `mode`, `dynamic`, …
    """

    def __init__(self, function: Callable[..., Any], name: str, log: logging.Logger = logger, **options: Any) -> None:
        self.function, self.name, self.log, self.options = function, name, log, options
        # Streams of different momenta go back through one graph, a pass each: nothing saved there may be overwritten.
        from torch._functorch import config  # not with kd_core.losses, which compiles nothing by itself

        config.donated_buffer = False
        self.compiled = torch.compile(function, **options)

    @property
    def is_compiled(self) -> bool:
        """Whether no call has fallen back to eager."""
        return self.compiled is not self.function

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy compiles its own `function`: what torch has compiled is bound to the original."""
        return partial(type(self), **self.options), (self.function, self.name, self.log)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.is_compiled:
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:
            if not is_compiler_error(error):
                raise
            reason = " ".join(str(error).split(DYNAMO_HINT)[0].split())[:200]
        # Eager first: dynamo reports a mistake of the function's that it sees while tracing, such as two shapes that do
        # not fit, as its own. Nothing has run yet, and eager raises the original.
        result = self.function(*args, **kwargs)
        self.log.warning("torch.compile of the %s failed (%s); it falls back to eager", self.name, reason)
        self.compiled = self.function
        return result


def is_compiler_error(error: BaseException) -> bool:
    """Whether an exception is the compiler's own, and not an out-of-memory that it has wrapped."""
    causes = [error]
    while (cause := getattr(causes[-1], "inner_exception", None) or causes[-1].__cause__) and cause not in causes:
        causes.append(cause)
    if any(isinstance(cause, MemoryError | torch.OutOfMemoryError) for cause in causes):
        return False
    return any(base.__module__.startswith(COMPILER_PACKAGES) for base in type(error).__mro__)


def compile_in_place(module: nn.Module, name: str, **options: Any) -> None:
    """`module.compile(**options)` that falls back to eager.

    The module stays what it is: its parameters keep their names, and a copy or a pickle of it is not compiled. Hooks of
    the module and of what is in it run, compiled too.
    """
    # Where torch's own nn.Module.compile puts what it compiles, and copies and pickles leave it out.
    module._compiled_call_impl = CompiledOrPlain(module._call_impl, name, **options)
