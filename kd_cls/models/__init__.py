"""The papers' CIFAR networks and ImageNet's MobileNetV1, registered with timm as `cifar_<name>` and `kd_mobilenetv1`."""
