"""Shared by the papers' networks: timm's classifier interface, and layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F


class PooledClassifier(nn.Module):
    """A network that averages its last feature map over all positions and classifies the mean with one linear layer.

    The papers' code averages with a window of the map's size at 32 px. The mean over all positions is the same there,
    and also works for other input sizes. Subclasses describe their stages in timm's `feature_info`, and name their last
    layer in `CLASSIFIER`, since the published state dicts differ in it.

    Args:
        num_features: channels of the last feature map.
        num_classes: 0 omits the linear layer.
        in_chans: input channels.
        drop_rate: dropout before the linear layer (timm's option; the papers use none).
    """

    CLASSIFIER = "fc"
    # Modules whose outputs are the stages' maps before the activation, where it is not the last module of a stage.
    PREACTIVATIONS: tuple[str, ...] = ()

    def __init__(self, num_features: int, num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = self.head_hidden_size = num_features
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate

    def _new_classifier(self) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes) if self.num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return getattr(self, self.CLASSIFIER)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new last layer for `num_classes` classes (0: none); `global_pool`, timm's argument, can only be "avg"."""
        if global_pool not in (None, "avg"):
            name = type(self).__name__
            raise ValueError(f"{name} pools by the mean and has no global_pool {global_pool!r}: use 'avg'")
        self.num_classes = num_classes
        setattr(self, self.CLASSIFIER, self._new_classifier())

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """What the first stage takes, of images."""
        return F.relu(self.bn1(self.conv1(x)), inplace=True)

    def stages(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        """The map that each stage ends with, fine to coarse; the papers' code compares these."""
        x = self.stem(x)
        for info in self.feature_info:
            x = getattr(self, info["module"])(x)
            yield x

    def after_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The map that is averaged, (N, num_features, h, w), of that of the last stage."""
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The last feature map (N, num_features, h, w) of images (N, in_chans, H, W)."""
        for stage in self.stages(x):
            x = stage  # the others are not kept
        return self.after_stages(x)

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, intermediates_only: bool = False, **_: Any
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """timm's: (last feature map, maps of the stages), or those maps alone.

        Args:
            x: images.
            indices: stages to return, an int for as many of the last; None for all.
            intermediates_only: return the maps alone.
        """
        maps = list(self.stages(x))
        kept, _ = feature_take_indices(len(maps), indices)
        found = [maps[index] for index in kept]
        return found if intermediates_only else (self.after_stages(maps[-1]), found)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Logits (N, num_classes) of a last feature map, or with `pre_logits` its mean (N, num_features)."""
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of images (N, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def stage_info(modules: Sequence[str], channels: Sequence[int], strides: Sequence[int]) -> list[dict[str, Any]]:
    """timm's `feature_info` of the stages that end in `modules`."""
    rows = zip(modules, channels, strides, strict=True)
    return [{"module": module, "num_chs": width, "reduction": stride} for module, width, stride in rows]


def init_weights(modules: Iterable[nn.Module], linear_std: float | None = None) -> None:
    """Convolutions from N(0, 2 / (k² · output channels)), their biases 0 (He et al., arXiv 1502.01852, fan-out form).

    Batch norms start at weight 1 and bias 0, torch's default. `linear_std` draws linear layers from N(0, linear_std²)
    with bias 0; None keeps torch's default for them.
    """
    for module in modules:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3×3 convolution, padded, no bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """1×1 convolution, no bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)


def conv_bn_relu(conv: nn.Conv2d) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The convolution, a batch norm and a ReLU."""
    return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)
