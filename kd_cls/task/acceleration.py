"""A frozen teacher made faster: batch norms folded, channels last, less precision, torch.compile."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.layers import Conv2dSame, get_notrace_modules
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from kd_cls.models.factory import compile_or_plain
from kd_core.utils.errors import UserError
from kd_core.utils.folding import CONVOLUTIONS, fold_batch_norms

logger = logging.getLogger("kd_cls")

VIEW_REFUSED = "view size is not compatible"  # how torch begins to say so


@dataclass(frozen=True)
class TeacherSpeed:
    """How a teacher computes its logits; what its network is and how it is saved stays the same.

    Args:
        fold_bn: batch norms become part of the convolutions before them: the same function, rounded otherwise.
        channels_last: weights and images lie in memory with the channels last.
        dtype: of weights and images, in place of the task's autocast; float32 leaves both, and the autocast, as they
            are. The logits are float32 again.
    """

    fold_bn: bool = False
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherSpeed":
        """What KD.TEACHER asks for."""
        node = cfg.KD.TEACHER
        return cls(node.FOLD_BN, node.CHANNELS_LAST, getattr(torch, node.DTYPE))

    @property
    def casts(self) -> bool:
        """Whether the teacher computes in a type of its own."""
        return self.dtype != torch.float32

    @property
    def dtype_name(self) -> str:
        """The type's name in KD.TEACHER.DTYPE."""
        return str(self.dtype).removeprefix("torch.")


class FastTeacher:
    """Logits (N, C) of a network for images (N, 3, H, W), from a copy of it that `speed` has changed.

    No nn.Module, so that no state dict, optimizer or `.to()` sees the copy: whoever moves the network makes another.

    Args:
        network: in eval mode and frozen; it stays as it is. The copy has its device and, but for `speed`, its dtype.
        speed: what changes.
        compile_options: of torch.compile; None leaves it off.
        example: a few images, on which the norms are tried: where the logits are others without them, they stay.
    """

    def __init__(
        self,
        network: nn.Module,
        speed: TeacherSpeed,
        compile_options: dict[str, Any] | None = None,
        example: Tensor | None = None,
    ) -> None:
        self.network, self.compile_options, self.example = network, compile_options, example
        self.become(speed)

    def become(self, speed: TeacherSpeed) -> None:
        """Compute as `speed` says from now on."""
        self.speed = speed
        self.forward: Callable[[Tensor], Tensor] = quicken(self.network, speed, self.example)
        if self.compile_options is not None:
            self.forward = compile_or_plain(self.forward, "teacher", **self.compile_options)

    def __call__(self, images: Tensor) -> Tensor:
        try:
            return self.logits(images)
        except RuntimeError as error:  # a network that takes a `view` of its maps is right in one layout only
            if not self.speed.channels_last or VIEW_REFUSED not in str(error):
                raise
        logger.warning("teacher: its forward takes a view that channels last does not have; going on without it")
        self.become(replace(self.speed, channels_last=False))
        return self.logits(images.contiguous())

    def logits(self, images: Tensor) -> Tensor:
        """The logits, in the layout and type of `speed`."""
        if self.speed.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if not self.speed.casts:
            return self.forward(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.forward(images.to(self.speed.dtype)).float()

    def first(self, images: Tensor, network: nn.Module) -> Tensor:
        """As a call, on the first batch; the log says how far `dtype` moves the logits from those of `network` itself.

        Raises:
            UserError: the network does not run in this type, or its logits overflow in it.
        """
        with torch.autocast(images.device.type, enabled=False):
            exact = network(images)
        name = self.speed.dtype_name
        try:
            logits = self(images)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"KD.TEACHER.DTYPE is {name!r}, in which the teacher does not run ({reason}): use float32, with "
                "SOLVER.AMP for mixed precision"
            ) from error
        if exact.isfinite().all() and not logits.isfinite().all():
            raise UserError(f"KD.TEACHER.DTYPE is {name!r}, in which the teacher's logits overflow: use bfloat16")
        logger.info(
            "teacher in %s: on the first batch max |Δ logits| is %.2g × their std, and %d of %d rows have another "
            "arg max",
            name,
            (logits - exact).abs().max() / exact.std(),
            (logits.argmax(1) != exact.argmax(1)).sum(),
            len(exact),
        )
        return logits


def quicken(network: nn.Module, speed: TeacherSpeed, example: Tensor | None = None) -> nn.Module:
    """A copy of a frozen network, changed as `speed` says; the network itself where nothing changes.

    Norms stay where the copy's logits of the `example` images are others without them.
    """
    if speed == TeacherSpeed():
        return network
    try:
        fast = copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:  # tensors that were computed, such as weight_norm's, have no copies
        reason = " ".join(str(error).split())[:200]
        logger.warning("teacher: %s cannot be copied (%s); it computes as loaded", type(network).__name__, reason)
        return network
    if speed.fold_bn:
        folded = fold_batch_norms(fast, (*CONVOLUTIONS, Conv2dSame), get_notrace_modules())
        if folded and example is not None and not agree(fast, network, example):
            logger.warning("teacher: %s gives other logits without its batch norms; they stay", type(network).__name__)
            return quicken(network, replace(speed, fold_bn=False))
        logger.info("teacher: %d batch norms folded into the convolutions before them", folded)
    if speed.casts:
        fast.to(speed.dtype)
    if speed.channels_last:
        convert_conv2d_weight_memory_format(fast, torch.channels_last)  # `.to` refuses networks with other convolutions
    share_memory(fast, network)
    return fast


@torch.no_grad()
def agree(fast: nn.Module, network: nn.Module, images: Tensor) -> bool:
    """Whether two networks give the same logits, up to what any rounding does: a wrong layer is far above that.

    Tracing a forward is right for what it sees of it: `isinstance(x, Tensor)` for one is False of what stands for x.
    """
    with torch.autocast(images.device.type, enabled=False):
        found, exact = fast(images).float(), network(images).float()
    return not bool((found - exact).abs().max() > 0.2 * exact.std())


def share_memory(fast: nn.Module, network: nn.Module) -> None:
    """Let each parameter of the copy that nothing has changed lie where the network's does: a transformer has one."""
    originals = dict(network.named_parameters())
    for name, parameter in fast.named_parameters():
        original = originals.get(name)
        if (
            original is not None
            and (parameter.dtype, parameter.stride()) == (original.dtype, original.stride())
            and torch.equal(parameter, original)
        ):
            parameter.data = original.data
