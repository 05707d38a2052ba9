"""A frozen teacher made faster: batch norms folded, channels last, lower precision, torch.compile."""

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from fvcore.common.config import CfgNode
from timm.layers import Conv2dSame, get_notrace_modules
from torch import Tensor, nn
from torch.nn.utils import convert_conv2d_weight_memory_format

from kd_cls.task.features import MapReader
from kd_core.utils.compiling import CompiledOrPlain
from kd_core.utils.errors import UserError, one_line
from kd_core.utils.folding import CONVOLUTIONS, fold_batch_norms

logger = logging.getLogger("kd_cls")


@dataclass(frozen=True)
class TeacherSpeed:
    """How a teacher computes its logits. Its network, and what is saved of it, stay the same.

    Args:
        fold_bn: fold batch norms into the convolutions before them: the same function up to rounding.
        channels_last: memory format of weights and images.
        dtype: of weights and images, without autocast; float32 keeps the network's dtype and the task's autocast. The
            logits are float32 again.
    """

    fold_bn: bool = False
    channels_last: bool = False
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherSpeed":
        """The options of KD.TEACHER."""
        node = cfg.KD.TEACHER
        return cls(node.FOLD_BN, node.CHANNELS_LAST, getattr(torch, node.DTYPE))

    @property
    def casts(self) -> bool:
        """Whether the teacher computes in a dtype of its own."""
        return self.dtype != torch.float32

    @property
    def dtype_name(self) -> str:
        """The dtype as KD.TEACHER.DTYPE writes it."""
        return str(self.dtype).removeprefix("torch.")


class FastTeacher:
    """Logits (N, C) of a network for images (N, 3, H, W), computed by a copy that `speed` has changed.

    It is not an nn.Module, so no state dict, optimizer or `.to()` sees the copy. After moving or loading the network,
    build another one.

    Args:
        network: in eval mode and frozen; it is not changed. The copy has its device and, but for `speed`, its dtype.
        speed: what to change.
        compile_options: of torch.compile; None leaves it off.
        example: a few images to try the folded norms on. Where they change the logits, the norms are kept.
    """

    def __init__(
        self,
        network: nn.Module,
        speed: TeacherSpeed,
        compile_options: dict[str, Any] | None = None,
        example: Tensor | None = None,
    ) -> None:
        self.speed = speed
        self.network = accelerate_teacher(network, speed, example)
        self.forward: Callable[[Tensor], Tensor] = self.network
        if compile_options is not None:
            self.forward = CompiledOrPlain(self.forward, "teacher", log=logger, **compile_options)

    def __call__(self, images: Tensor) -> Tensor:
        with self.precision(images):
            logits = self.forward(self.prepare(images))
        return logits.float() if self.speed.casts else logits

    def with_maps(self, images: Tensor, reader: MapReader) -> tuple[Tensor, list[Tensor]]:
        """Logits as of a call, and the feature maps, in the dtype in which they were computed; not compiled."""
        with self.precision(images):
            logits, maps = reader(self.network, self.prepare(images))
        return logits.float() if self.speed.casts else logits, maps

    def precision(self, images: Tensor) -> AbstractContextManager[Any]:
        """No autocast where `speed` has a dtype of its own."""
        return torch.autocast(images.device.type, enabled=False) if self.speed.casts else nullcontext()

    def prepare(self, images: Tensor) -> Tensor:
        """Images in the memory format and the dtype of the network."""
        if self.speed.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images.to(self.speed.dtype) if self.speed.casts else images

    def forward_and_log_drift(self, images: Tensor, network: nn.Module) -> Tensor:
        """The logits, like a call; also logs how far `speed.dtype` moves them from those of the original `network`.

        Raises:
            UserError: the network does not run in this dtype, or its logits overflow in it.
        """
        with torch.autocast(images.device.type, enabled=False):
            exact = network(images)
        name = self.speed.dtype_name
        try:
            logits = self(images)
        except RuntimeError as error:
            raise UserError(
                f"KD.TEACHER.DTYPE is {name!r}, in which the teacher does not run ({one_line(error)}): use float32, "
                "with SOLVER.AMP for mixed precision"
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


def accelerate_teacher(network: nn.Module, speed: TeacherSpeed, example: Tensor | None = None) -> nn.Module:
    """A copy of a frozen network, changed as `speed` says; the network itself where nothing changes.

    Where folding changes the logits of the `example` images, the batch norms are kept.
    """
    if speed == TeacherSpeed():
        return network
    try:
        fast = copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:  # computed tensors, such as those of weight_norm, cannot be copied
        logger.warning("teacher: %s cannot be copied (%s); it runs as loaded", type(network).__name__, one_line(error))
        return network
    if speed.fold_bn:
        folded = fold_batch_norms(fast, (*CONVOLUTIONS, Conv2dSame), get_notrace_modules())
        if folded and example is not None and not same_logits(fast, network, example):
            logger.warning(
                "teacher: folding the batch norms of %s changes its logits; they are kept", type(network).__name__
            )
            return accelerate_teacher(network, replace(speed, fold_bn=False))
        logger.info("teacher: %d batch norms folded into the convolutions before them", folded)
    if speed.casts:
        fast.to(speed.dtype)
    if speed.channels_last:
        convert_conv2d_weight_memory_format(fast, torch.channels_last)  # `.to` refuses networks with other convolutions
    share_unchanged_parameters(fast, network)
    return fast


@torch.no_grad()
def same_logits(fast: nn.Module, network: nn.Module, images: Tensor) -> bool:
    """Whether two networks give the same logits, up to rounding of any dtype. A wrong layer changes them far more.

    Folding traces the forward, which may see something else than a call: `isinstance(x, Tensor)` is False of a proxy.
    """
    with torch.autocast(images.device.type, enabled=False):
        found, exact = fast(images).float(), network(images).float()
    return not bool((found - exact).abs().max() > 0.2 * exact.std())


def share_unchanged_parameters(fast: nn.Module, network: nn.Module) -> None:
    """Let unchanged parameters of the copy share the network's memory, so that a transformer is stored once."""
    originals = dict(network.named_parameters())
    for name, parameter in fast.named_parameters():
        original = originals.get(name)
        if (
            original is not None
            and (parameter.dtype, parameter.stride()) == (original.dtype, original.stride())
            and torch.equal(parameter, original)
        ):
            parameter.data = original.data
