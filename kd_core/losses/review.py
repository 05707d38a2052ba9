"""ReviewKD (CVPR 2021): coarse student maps are fused into finer ones and compared with the teacher's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_core.losses.feature import FeatureLoss

POOLED_SIZES = (4, 2, 1)
LARGEST_MID = 512  # of the fusion's width (released code)


class ReviewFusion(nn.Module):
    """The attention-based fusion of ReviewKD (CVPR 2021), from coarse to fine, y_{L+1} being absent:

        u_l   = BN(conv1×1(x_l → mid))
        a     = sigmoid(conv1×1([u_l, up(y_{l+1})] → 2))
        y_l   = a_0 · u_l + a_1 · up(y_{l+1})                     u_l at the coarsest level
        out_l = BN(conv3×3(y_l → channels of t_l))

    `up` is nearest-neighbour. The convolutions have no bias (that of the attention has one) and start kaiming-uniform
    with a = 1, as in the released code. The parameters train with the student and are no part of it afterwards.

    Args:
        student_channels: channels of the student's maps x_1 … x_L, fine to coarse.
        teacher_channels: channels of the teacher's maps t_1 … t_L.
        mid_channels: width of the fusion.

    Raises:
        ValueError: no level, another number of levels on one side, or a width below 1.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int], mid_channels: int) -> None:
        super().__init__()
        student_channels, teacher_channels = list(student_channels), list(teacher_channels)
        if not student_channels or len(student_channels) != len(teacher_channels):
            raise ValueError(
                "student_channels and teacher_channels must name the same levels, one or more, not "
                f"{student_channels} and {teacher_channels}"
            )
        for name, widths in (
            ("student_channels", student_channels),
            ("teacher_channels", teacher_channels),
            ("mid_channels", [mid_channels]),
        ):
            if any(isinstance(width, bool) or not isinstance(width, int) or width < 1 for width in widths):
                raise ValueError(f"{name} must be whole numbers >= 1, not {widths}")
        self.reduce = nn.ModuleList(_conv_norm(width, mid_channels, 1) for width in student_channels)
        self.expand = nn.ModuleList(_conv_norm(mid_channels, width, 3) for width in teacher_channels)
        self.attend = nn.ModuleList(nn.Conv2d(2 * mid_channels, 2, 1) for _ in student_channels[1:])

    def forward(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The fused maps, fine to coarse, in the teacher's channels.

        Args:
            student_maps: x_l, (N, C_l, H_l, W_l), fine to coarse.
            teacher_maps: maps whose heights and widths the output shall have, the student's own where None. As in the
                released code, y_l is resized (nearest) before the last convolution, and keeps that size.

        Raises:
            ValueError: a number of maps, or of channels, that the module was not built for.
        """
        channels = [block[0].in_channels for block in self.reduce]
        if [x.shape[1] for x in student_maps] != channels:
            raise ValueError(
                f"the student's maps have {[x.shape[1] for x in student_maps]} channels, but the fusion was built for "
                f"student_channels {channels}, fine to coarse"
            )
        if teacher_maps is not None and len(teacher_maps) != len(channels):
            raise ValueError(f"there are {len(teacher_maps)} teacher maps for {len(channels)} student maps")
        fused: list[Tensor] = []
        coarser: Tensor | None = None
        for level in reversed(range(len(channels))):
            y = self.reduce[level](student_maps[level])
            if coarser is not None:
                up = _resize(coarser, y.shape[2:])
                attention = self.attend[level](torch.cat([y, up], 1)).sigmoid()
                y = attention[:, :1] * y + attention[:, 1:] * up
            coarser = y if teacher_maps is None else _resize(y, teacher_maps[level].shape[2:])
            fused.append(self.expand[level](coarser))
        return fused[::-1]


def hierarchical_context_loss(fused: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """The HCL of ReviewKD: mean squared errors of the maps and of their 4×4, 2×2 and 1×1 average pools.

        HCL = Σ_l [ MSE(out_l, t_l) + ½ MSE(pool4) + ¼ MSE(pool2) + ⅛ MSE(pool1) ] / (1 + ½ + ¼ + ⅛)

    A pooled size counts only where it is smaller than the map's height, and each that counts has half the weight of
    the one before; they are divided by the sum of their weights.

    Args:
        fused: (N, C_l, H_l, W_l), at least one level.
        teacher_maps: of the same shapes; no gradient flows into them.

    Returns:
        A scalar, computed in at least float32 whatever the autocast state.

    Raises:
        ValueError: no maps, another number of them, or another shape on one side.
    """
    shapes, teacher_shapes = ([tuple(m.shape) for m in maps] for maps in (fused, teacher_maps))
    if not shapes or shapes != teacher_shapes:
        raise ValueError(f"the fused maps are {shapes} and the teacher's {teacher_shapes}: shapes must agree")
    with torch.autocast(fused[0].device.type, enabled=False):
        return sum(_level_loss(out, teacher.detach()) for out, teacher in zip(fused, teacher_maps, strict=True))


def _level_loss(out: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(out.dtype, teacher.dtype), torch.float32)
    difference = out.to(dtype) - teacher.to(dtype)  # pooling is linear: one map is pooled, not two
    loss, weight, total = _mean_square(difference), 1.0, 1.0
    for size in POOLED_SIZES:
        if size < out.shape[2]:
            weight /= 2
            total += weight
            loss = loss + weight * _mean_square(F.adaptive_avg_pool2d(difference, size))
    return loss / total


def _mean_square(difference: Tensor) -> Tensor:
    """The mean of the squares; 0 of nothing."""
    return difference.square().sum() / max(difference.numel(), 1)


def _resize(y: Tensor, size: Sequence[int]) -> Tensor:
    return y if y.shape[2:] == tuple(size) else F.interpolate(y, tuple(size), mode="nearest")


def _conv_norm(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class ReviewLoss(FeatureLoss):
    """ReviewKD (CVPR 2021): review = HCL(fusion(student_maps), teacher_maps).

    Args:
        student_channels, teacher_channels: of the maps, fine to coarse.
        mid_channels: width of the fusion; 0: the channels of the student's coarsest map, at most 512 (released code).
        options: `weight`, `warmup`, `stream`.
    """

    terms = ("review",)

    def __init__(
        self, student_channels: Sequence[int], teacher_channels: Sequence[int], mid_channels: int = 0, **options: Any
    ) -> None:
        super().__init__(**options)
        mid_channels = mid_channels or min([LARGEST_MID, *student_channels[-1:]])
        self.fusion = ReviewFusion(student_channels, teacher_channels, mid_channels)

    def compare(self, student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"review": hierarchical_context_loss(self.fusion(student_maps, teacher_maps), teacher_maps)}
