"""The papers' networks, registered with timm by importing this package: `timm.create_model("cifar_resnet8x4")`.

`cifar_<name>` for the 32 px networks, `kd_mobilenetv1` for ImageNet's MobileNetV1 under its published names.
"""

from kd_cls.models import (  # noqa: F401  (each registers its networks with timm)
    cifar_mobilenetv2,
    cifar_resnet,
    cifar_resnetv2,
    cifar_shufflenetv1,
    cifar_shufflenetv2,
    cifar_vgg,
    cifar_wrn,
    mobilenetv1,
)
