"""What the rest of the code asks of a meta-architecture by its name, found in detectron2's registry."""

from detectron2.modeling import META_ARCH_REGISTRY

BOX_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES",)


def distilled_architecture(name: str) -> type | None:
    """The registered meta-architecture `name` where it distils (a `Distilled`), else None."""
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return found if getattr(found, "distils", False) else None


def distilled_names() -> list[str]:
    """The names of all registered meta-architectures that distil."""
    return [name for name, found in META_ARCH_REGISTRY if getattr(found, "distils", False)]


def plain_name(name: str) -> str:
    """The meta-architecture that `name` is a subclass of; the name itself where it does not distil."""
    found = distilled_architecture(name)
    if found is None:
        return name
    plain = (c.__name__ for c in found.__mro__ if c.__name__ in META_ARCH_REGISTRY and not getattr(c, "distils", False))
    return next(plain)


def class_keys(name: str) -> tuple[str, ...]:
    """The config keys that hold the number of classes of the meta-architecture `name`, distilled or plain."""
    for distilled in distilled_names():
        if name in (distilled, plain_name(distilled)):
            return META_ARCH_REGISTRY.get(distilled).class_keys
    return BOX_CLASSES
