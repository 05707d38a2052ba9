"""What of a timm extractor is trained: its BatchNorms, and its first stages."""

import torch
from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d
from torch.nn.modules.batchnorm import _BatchNorm

from kd_det.modeling.backbone.timm_fpn import TimmBackbone, run_probe

NORMS = ("BN", "FrozenBN", "SyncBN")


def set_norm(bottom_up: TimmBackbone, norm: str) -> None:
    """Turn every BatchNorm of the network into what MODEL.TIMM.NORM says; "BN" leaves the network as timm builds it.

    Raises:
        ValueError: another word; or a network without a single BatchNorm, whose norms have no running statistics.
    """
    if norm not in NORMS:
        raise ValueError(f"MODEL.TIMM.NORM is {norm!r}, expected one of {', '.join(NORMS)}")
    if norm == "BN":
        return
    if not any(isinstance(module, _BatchNorm) for module in bottom_up.modules()):
        raise ValueError(f"MODEL.TIMM.NORM is {norm}, but the network has no BatchNorm: set it to BN, its own norms")
    convert = freeze_batch_norm_2d if norm == "FrozenBN" else convert_sync_batchnorm
    for name, child in list(bottom_up.named_children()):
        bottom_up._modules[name] = convert(child)


def freeze_until(bottom_up: TimmBackbone, stage: int) -> None:
    """Freeze every layer that the map `res<stage>` is computed from, its BatchNorms with their statistics; 0: nothing.

    Which those are is asked of autograd, so that it holds for every architecture.

    Raises:
        ValueError: the network has no such map.
    """
    if stage <= 0:
        return
    name = f"res{stage}"
    if name not in bottom_up.output_shape():
        allowed = ", ".join(feature.removeprefix("res") for feature in bottom_up.output_shape())
        raise ValueError(
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
