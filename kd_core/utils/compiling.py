"""torch.compile with a way back."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

logger = logging.getLogger(__name__)

DYNAMO_HINT = "Set TORCHDYNAMO_VERBOSE"  # dynamo ends its errors with a paragraph for torch's developers


class CompiledOrPlain:
    """`function` as torch.compile makes it; or, with one message, `function` itself once a call fails to compile.

    Compilation happens in the first calls, and with it its failures: no C++ compiler, an operation that the backend
    does not know, an input of another kind. An error that is not the compiler's comes again from `function` itself.

    Args:
        function: what is compiled: a module, or a function.
        name: of it, for the message.
        log: where the message goes.
        options: torch.compile's: `backend`, `mode`, `dynamic`, …
    """

    def __init__(self, function: Callable[..., Any], name: str, log: logging.Logger = logger, **options: Any) -> None:
        self.function, self.name, self.log, self.options = function, name, log, options
        # Streams of different momenta go back through one graph, a pass each: nothing saved there may be overwritten.
        functorch_config.donated_buffer = False  # torch ≥ 2.6
        self.compiled = torch.compile(function, **options)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A copy compiles its own `function`: what torch has compiled is bound to the original."""
        return partial(type(self), **self.options), (self.function, self.name, self.log)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is self.function:
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except Exception as error:  # dynamo, inductor and the C++ compiler each raise their own
            reason = " ".join(str(error).split(DYNAMO_HINT)[0].split())[:200]
            self.log.warning("torch.compile of the %s failed (%s); going on without it", self.name, reason)
            self.compiled = self.function
            return self.function(*args, **kwargs)


def compile_in_place(module: nn.Module, name: str, **options: Any) -> None:
    """`module.compile(**options)` with a way back.

    The module stays what it is: its parameters keep their names, and a copy or a pickle of it is not compiled. Hooks of
    the module and of what is in it run, compiled too.
    """
    # Where torch's own nn.Module.compile puts what it compiles, and copies and pickles leave it out.
    module._compiled_call_impl = CompiledOrPlain(module._call_impl, name, **options)
