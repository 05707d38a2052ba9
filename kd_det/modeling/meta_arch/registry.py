"""What the rest of the code asks of a meta-architecture by its name, found in detectron2's registry."""

from detectron2.modeling import META_ARCH_REGISTRY

BOX_CLASSES = ("MODEL.ROI_HEADS.NUM_CLASSES",)
PIXEL_CLASSES = "MODEL.SEM_SEG_HEAD.NUM_CLASSES"


def distilled_architecture(name: str) -> type | None:
    """The registered meta-architecture `name` where it distils (a `Distilled`), else None."""
    found = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    return found if getattr(found, "distils", False) else None


def distilled_names() -> list[str]:
    """The names of all registered meta-architectures that distil."""
    return [name for name, found in META_ARCH_REGISTRY if getattr(found, "distils", False)]


def plain_class(distilled: type) -> type:
    """detectron2's class that a distilled one is a subclass of."""
    return next(cls for cls in distilled.__mro__ if not getattr(cls, "distils", False))


def plain_name(name: str) -> str:
    """The meta-architecture that `name` is a subclass of; the name itself where it does not distil."""
    found = distilled_architecture(name)
    return name if found is None else plain_class(found).__name__


def distilled_name(name: str) -> str | None:
    """The distilled meta-architecture that a student of the meta-architecture `name` has, distilled or plain."""
    return next((found for found in distilled_names() if name in (found, plain_name(found))), None)


def class_keys(name: str) -> tuple[str, ...]:
    """The config keys that hold the number of classes of the meta-architecture `name`, distilled or plain."""
    distilled = distilled_name(name)
    return BOX_CLASSES if distilled is None else META_ARCH_REGISTRY.get(distilled).class_keys
