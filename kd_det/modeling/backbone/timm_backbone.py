"""A timm feature extractor as detectron2's bottom-up network; its norms, and the stages that stay frozen."""

import math

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_core.utils.errors import UserError

NORMS = ("BN", "FrozenBN", "SyncBN")
# Not square, and not a power of two: detectors pad to a multiple of 32 and to nothing else.
PROBE_SIZE = (64, 96)


class TimmBackbone(Backbone):
    """A feature extractor of timm as detectron2's bottom-up network.

    Its feature maps are named as those of detectron2's ResNets: `res<k>` is the deepest map of stride 2^k,
    (N, C_k, H / 2^k, W / 2^k), also where the extractor returns NHWC. The parameters keep the extractor's own names
    (`conv_stem.weight`, …), which `tools/convert_weights.py` writes for MobileNetV2.

    Args:
        extractor: from `timm.create_model(name, features_only=True)`.
        in_channels: channels of its images.
    """

    pretrained = False  # whether it was built with trained weights

    def __init__(self, extractor: nn.Module, in_channels: int = 3) -> None:
        super().__init__()
        self.in_channels = in_channels
        # This module and the extractor share their layers. As a child, the extractor would prefix all parameter names.
        self.__dict__["extractor"] = extractor
        self._modules, self._parameters = extractor._modules, extractor._parameters
        self._buffers = extractor._buffers
        self._channels_last = str(getattr(extractor, "output_fmt", "NCHW")).endswith("NHWC")
        info = extractor.feature_info
        strides, channels = info.reduction(), info.channels()
        # The deepest of several maps of one stride comes last.
        self._index = {stage_name(stride): i for i, stride in enumerate(strides)}
        self._out_features = list(self._index)
        self._out_feature_strides = {name: strides[i] for name, i in self._index.items()}
        self._out_feature_channels = {name: channels[i] for name, i in self._index.items()}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Feature maps by name, of normalised images (N, in_channels, H, W)."""
        maps = self.extractor.forward(images)
        if self._channels_last:
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return {name: maps[i] for name, i in self._index.items()}

    def train(self, mode: bool = True) -> "TimmBackbone":
        self.extractor.training = mode
        return super().train(mode)

    @property
    def size_divisibility(self) -> int:
        """Images are padded to multiples of the largest stride."""
        return max(self._out_feature_strides.values())

    def check_maps(self, in_features: list[str]) -> None:
        """Check that the maps of an image whose sides are multiples of 32 have the shapes of `output_shape()`.

        Raises:
            UserError: the first map that has not, or the network's own error.
        """
        maps = run_probe(self)
        height, width = PROBE_SIZE
        for name in in_features:
            spec: ShapeSpec = self.output_shape()[name]
            expected = (1, spec.channels, height // spec.stride, width // spec.stride)
            if tuple(maps[name].shape) != expected:
                raise UserError(
                    f"its map {name} of an image of {height}×{width} px is {tuple(maps[name].shape)}, and an FPN needs "
                    f"{expected}: a network whose convolutions pad is needed"
                )


def stage_name(stride: int) -> str:
    """detectron2's name of a feature map of this stride."""
    return f"res{int(math.log2(stride))}"


def run_probe(bottom_up: TimmBackbone) -> dict[str, Tensor]:
    """The feature maps of one black image in eval mode; nothing in the network changes.

    Raises:
        UserError: the network takes no image of such a size.
    """
    weight = next(bottom_up.parameters())
    was_training = bottom_up.training
    bottom_up.eval()
    try:
        return bottom_up(weight.new_zeros(1, bottom_up.in_channels, *PROBE_SIZE))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"it takes no image of {PROBE_SIZE[0]}×{PROBE_SIZE[1]} px ({error}); detectors feed images of every size, "
            "rounded up to multiples of 32. Some networks allow that by an argument in MODEL.TIMM.KWARGS, as Swin does "
            "by [[strict_img_size, False]]"
        ) from error
    finally:
        bottom_up.train(was_training)


def set_norm(bottom_up: TimmBackbone, norm: str) -> None:
    """Convert every BatchNorm to the norm that MODEL.TIMM.NORM names; "BN" leaves the network as timm builds it.

    Raises:
        UserError: an unknown norm; or a network without a BatchNorm, whose norms have no running statistics.
    """
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # timm takes a second to import

    if norm not in NORMS:
        raise UserError(f"MODEL.TIMM.NORM is {norm!r}, expected one of {', '.join(NORMS)}")
    if norm == "BN":
        return
    if not any(isinstance(module, _BatchNorm) for module in bottom_up.modules()):
        raise UserError(f"MODEL.TIMM.NORM is {norm}, but the network has no BatchNorm: set it to BN, its own norms")
    convert = freeze_batch_norm_2d if norm == "FrozenBN" else convert_sync_batchnorm
    for name, child in list(bottom_up.named_children()):
        bottom_up._modules[name] = convert(child)


def freeze_until(bottom_up: TimmBackbone, stage: int) -> None:
    """Freeze every layer that the map `res<stage>` is computed from, with the statistics of its BatchNorms; 0: nothing.

    Autograd tells which layers these are, so that it works for every architecture.

    Raises:
        UserError: the network has no such map.
    """
    if stage <= 0:
        return
    from timm.layers import freeze_batch_norm_2d  # timm takes a second to import

    name = f"res{stage}"
    if name not in bottom_up.output_shape():
        allowed = ", ".join(feature.removeprefix("res") for feature in bottom_up.output_shape())
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {stage}, which freezes all layers up to stride {2**stage}, but the network "
            f"has no map of that stride: set it to 0 (none) or one of {allowed}"
        )
    trained = [p for p in bottom_up.parameters() if p.requires_grad]
    with torch.enable_grad():
        feature = run_probe(bottom_up)[name]
        reached = torch.autograd.grad(feature.sum(), trained, allow_unused=True) if trained else []
    for parameter, gradient in zip(trained, reached, strict=True):
        parameter.requires_grad_(gradient is None)
    for name, module in list(bottom_up.named_modules()):
        if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
            parent, _, leaf = name.rpartition(".")
            bottom_up.get_submodule(parent).add_module(leaf, freeze_batch_norm_2d(module))
