"""How a network of the papers becomes a name of timm's."""

import sys
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from kd_cls.data.statistics import CIFAR100_MEAN, CIFAR100_STD


def cifar_cfg(classifier: str, first_conv: str = "conv1") -> dict[str, Any]:
    """timm's `pretrained_cfg` of a CIFAR-100 network: 100 classes, 32 px, mean and std (timm's default is ImageNet's).

    `classifier` and `first_conv` name the layers that timm replaces for other classes or input channels.
    """
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


def register_networks(network: type[nn.Module], cfg: dict[str, Any], **variants: dict[str, Any]) -> None:
    """Register `network` with timm under the names of `variants`, {name: arguments}.

    Each name becomes a function of the network's module, as in timm's own files, and `default_cfgs` holds their `cfg`.
    """
    module = sys.modules[network.__module__]
    module.default_cfgs = generate_default_cfgs(dict.fromkeys(variants, cfg))
    for name, arguments in variants.items():

        def create(pretrained: bool = False, name: str = name, own: Any = arguments, **kwargs: Any) -> nn.Module:
            return build_model_with_cfg(network, name, pretrained, **own, **kwargs)

        create.__name__, create.__module__ = name, module.__name__
        setattr(module, name, register_model(create))
