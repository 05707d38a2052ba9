"""One layout of config keys for every loss, shared by kd_det and kd_cls, and how such a node becomes a loss."""

from typing import Any

from fvcore.common.registry import Registry
from torch import nn

from kd_core.losses.aekt import AEKTLoss
from kd_core.losses.base import DistillationLoss
from kd_core.losses.dist import DISTLoss
from kd_core.losses.dkd import DKDLoss
from kd_core.losses.foreground_background import ForegroundBackground
from kd_core.losses.gdkd import GDKD3Loss, GDKDLoss
from kd_core.losses.kd import KDLoss
from kd_core.losses.two_view import CRLDLoss, MLKDLoss
from kd_core.topk import TopKSchedule
from kd_core.utils.errors import UserError

# Builders of losses by the name in LOSS.NAME. A builder takes the config node and returns the loss:
#
#     @LOSS_REGISTRY.register()
#     def my_loss(cfg):
#         return MyLoss(**common_options(cfg))
LOSS_REGISTRY = Registry("LOSS")


def add_loss_config(node: Any) -> None:
    """Add the keys of every loss, with their defaults, to an empty CfgNode of yacs, fvcore or detectron2."""
    new = type(node)
    # The distillation loss: none, kd, dkd, gdkd, gdkd3, gdkds, aekt, dist, or what else is in LOSS_REGISTRY;
    # mlkd and crld for two views of each image.
    node.NAME = "none"
    # T of both softmaxes: 4 on CIFAR-100, 1 on ImageNet and in detectors.
    node.TEMPERATURE = 4.0
    # Factor of the whole distillation loss.
    node.WEIGHT = 1.0
    # Share of training progress over which the loss rises linearly from 0 to its full weight.
    node.WARMUP = 0.0
    # Z-score both logit vectors first (logit standardization; T 2 and WEIGHT 9 there).
    node.STANDARDIZE = False
    # torch.compile the loss; falls back to eager, with a message, where that fails. The loss is less than 1 % of a step
    # (docs/performance.md has what compiling gains); compiling takes seconds to a minute.
    node.COMPILE = False

    node.DKD = new()
    # Weight of the target-class term, TCKD.
    node.DKD.ALPHA = 1.0
    # Weight of the non-target term, NCKD.
    node.DKD.BETA = 8.0
    # Which class is split from the rest: "target", the label's class, or "teacher_top1", the teacher's largest logit.
    node.DKD.PARTITION = "target"

    add_gdkd_config(node)

    node.AEKT = new()
    # Weight of the explicit term: the teacher's confidence in the target class.
    node.AEKT.EXPLICIT_WEIGHT = 1.0
    # Weight of the implicit term: the teacher's distribution over the other classes.
    node.AEKT.IMPLICIT_WEIGHT = 8.0
    # Cap of the ratio of confidences, teacher to student, that weights the explicit term.
    node.AEKT.MAX_RATIO = 10.0

    node.DIST = new()
    # Weight of the correlation over a row's classes.
    node.DIST.BETA = 1.0
    # Weight of the correlation over a class's rows.
    node.DIST.GAMMA = 1.0

    add_two_view_config(node)

    node.TOPK = new()
    # Dynamic top-k mask of the non-target distribution (DeepKD), for kd, dkd, aekt, mlkd and crld.
    node.TOPK.ENABLED = False
    # Share of the non-target classes that is admitted at the start.
    node.TOPK.START = 0.05
    # Share in the middle phase.
    node.TOPK.PLATEAU = 0.5
    # Lengths of the phases (rise to the plateau, plateau, rise to all) as shares of training, 1 or less together.
    node.TOPK.PHASES = [1 / 3, 1 / 3, 1 / 3]


def add_gdkd_config(node: Any) -> None:
    """The keys of GDKD and its variants."""
    new = type(node)
    node.GDKD = new()
    # Weights of the mass term, of the term within the top classes, and of that within the rest.
    node.GDKD.W0 = 1.0
    node.GDKD.W1 = 1.0
    node.GDKD.W2 = 8.0
    # How many of the teacher's largest logits are the top group.
    node.GDKD.K = 5
    # Divergence within the groups: "forward" KL(T||S), "reverse" KL(S||T), or "both", their mean.
    node.GDKD.KL = "forward"
    # Draw the size of the top group row by row from the teacher's probabilities; K is its cap.
    node.GDKD.AUTO_K = False

    node.GDKD3 = new()
    # Weights of the mass term, of the term within the top classes, and of that within the rest.
    node.GDKD3.W0 = 1.0
    node.GDKD3.W1 = 1.0
    node.GDKD3.W2 = 1.0
    # The groups are the teacher's top-1, its top-2 to top-K, and the rest.
    node.GDKD3.K = 5

    node.GDKDS = new()
    # Names of the losses of a detector's foreground and background rows; each reads its own keys.
    node.GDKDS.FOREGROUND = "gdkd3"
    node.GDKDS.BACKGROUND = "dkd"


def add_two_view_config(node: Any) -> None:
    """The keys of MLKD and CRLD, which compare a weak and a strong view of each image."""
    new = type(node)
    node.TWO_VIEW = new()
    # Weigh the two parts of every divergence by ALPHA and BETA, as DKD does (DeepKD over mlkd and crld, released code);
    # False is the divergence itself, ALPHA and BETA unread.
    node.TWO_VIEW.DECOUPLED = False
    # Weight of the target-class parts, TCKD.
    node.TWO_VIEW.ALPHA = 1.0
    # Weight of the non-target parts, NCKD: 2 on CIFAR-100, .5 on ImageNet.
    node.TWO_VIEW.BETA = 2.0
    # The value of the released code where the formula has another (mlkd).
    node.TWO_VIEW.RELEASED = False

    node.MLKD = new()
    # T of every level; TEMPERATURE is unread.
    node.MLKD.TEMPERATURES = [4.0, 3.0, 5.0, 2.0, 6.0]
    # Factor of the loss, times WEIGHT.
    node.MLKD.WEIGHT = 0.5
    # Further factor of the term of class similarities (ours; 1 in the paper). The term grows like (images / classes)²,
    # so what suits CIFAR-100's 64 / 100 is too much for few classes.
    node.MLKD.CLASS_WEIGHT = 1.0
    # The same for the term of image similarities.
    node.MLKD.BATCH_WEIGHT = 1.0

    node.CRLD = new()
    # Weight of the divergences within a view.
    node.CRLD.WITHIN_WEIGHT = 2.0
    # Weight of the divergences across the views.
    node.CRLD.CROSS_WEIGHT = 0.5
    # Least confidence of the teacher in its weak view, for the rows within a view.
    node.CRLD.WITHIN_THRESHOLD = 0.9
    # Least confidence of the teacher in its strong view, for the rows across the views.
    node.CRLD.CROSS_THRESHOLD = 0.2


def build_loss(cfg: Any, num_classes: int | None = None, views: int | None = None) -> nn.Module | None:
    """The loss that a config node with the keys of `add_loss_config` describes; None for the name "none".

    Args:
        cfg: the node.
        num_classes: C, background included; where it is given, k is checked against it.
        views: how many views of an image the caller has; where it is given, the loss must take as many.

    Raises:
        UserError: a name that is not registered (the message lists those that are), a value that the loss refuses, or
            a loss of another number of views.
    """
    if cfg.NAME == "none":
        return None
    names = [name for name, _ in LOSS_REGISTRY]
    if cfg.NAME not in names:
        raise UserError(f"LOSS.NAME is {cfg.NAME!r}, but the losses are: {', '.join(['none', *sorted(names)])}")
    try:
        loss = LOSS_REGISTRY.get(cfg.NAME)(cfg)
        if num_classes is not None:
            loss.check_num_classes(num_classes)
    except ValueError as error:
        raise UserError(f"LOSS {cfg.NAME}: {error}") from error
    wanted = getattr(loss, "views", 1)
    if views is not None and wanted != views:
        raise UserError(
            f"LOSS.NAME {cfg.NAME!r} compares {wanted} view(s) of each image, but there are {views} here: "
            "mlkd and crld train classifiers with DATA.VIEWS 2, the other losses take DATA.VIEWS 1"
        )
    if cfg.COMPILE and isinstance(loss, DistillationLoss):  # the parts of gdkds have come through here
        loss.compile()
    return loss


def build_kd_loss(
    node: Any, num_classes: int, warmup_key: str, training_length: float, views: int = 1
) -> nn.Module | None:
    """`build_loss` of a config's KD.LOSS, whose warm-up may be given in iterations or epochs instead of as a share.

    Args:
        node: KD.LOSS; it is not changed.
        num_classes: C, background included.
        warmup_key: key of the node that holds the warm-up's length, WARMUP_ITERS or WARMUP_EPOCHS.
        training_length: length of the training in the same unit.
        views: how many views of an image the loss gets.

    Raises:
        UserError: both `warmup_key` and WARMUP, or what `build_loss` refuses, by its full key.
    """
    node = share_of_training(node, "KD.LOSS", warmup_key, training_length)
    try:
        return build_loss(node, num_classes, views)
    except ValueError as error:  # names the keys under LOSS
        raise UserError(f"KD.{error}") from error


def share_of_training(node: Any, key: str, warmup_key: str, training_length: float) -> Any:
    """A copy of a loss's node whose WARMUP is the share of the training that `warmup_key` gives.

    Raises:
        UserError: the node, called `key` in the config, has both.
    """
    length = getattr(node, warmup_key)
    if length < 0:
        raise UserError(f"{key}.{warmup_key} is {length}, the length of the warm-up: it must be 0 or more")
    if length and node.WARMUP:
        raise UserError(
            f"{key}.{warmup_key} {length} and {key}.WARMUP {node.WARMUP} both give the length of the warm-up: set "
            "one of them to 0"
        )
    node = node.clone()
    node.defrost()
    if length:
        node.WARMUP = 1.0 if length >= training_length else length / training_length
    return node


def common_options(cfg: Any) -> dict[str, Any]:
    """The keyword arguments that every `DistillationLoss` takes."""
    topk = cfg.TOPK
    return {
        "temperature": cfg.TEMPERATURE,
        "weight": cfg.WEIGHT,
        "warmup": cfg.WARMUP,
        "standardize": cfg.STANDARDIZE,
        "topk": TopKSchedule(topk.START, topk.PLATEAU, topk.PHASES) if topk.ENABLED else None,
    }


@LOSS_REGISTRY.register()
def kd(cfg: Any) -> KDLoss:
    """LOSS.NAME kd."""
    return KDLoss(**common_options(cfg))


@LOSS_REGISTRY.register()
def dkd(cfg: Any) -> DKDLoss:
    """LOSS.NAME dkd, keys DKD."""
    node = cfg.DKD
    return DKDLoss(node.ALPHA, node.BETA, partition=node.PARTITION, **common_options(cfg))


@LOSS_REGISTRY.register()
def gdkd(cfg: Any) -> GDKDLoss:
    """LOSS.NAME gdkd, keys GDKD."""
    node = cfg.GDKD
    return GDKDLoss(node.W0, node.W1, node.W2, node.K, kl=node.KL, auto_k=node.AUTO_K, **common_options(cfg))


@LOSS_REGISTRY.register()
def gdkd3(cfg: Any) -> GDKD3Loss:
    """LOSS.NAME gdkd3, keys GDKD3."""
    node = cfg.GDKD3
    return GDKD3Loss(node.W0, node.W1, node.W2, node.K, **common_options(cfg))


@LOSS_REGISTRY.register()
def gdkds(cfg: Any) -> ForegroundBackground:
    """LOSS.NAME gdkds: GDKDS.FOREGROUND and GDKDS.BACKGROUND, each with its own keys."""
    parts = []
    for name in (cfg.GDKDS.FOREGROUND, cfg.GDKDS.BACKGROUND):
        if name in ("none", "gdkds"):
            raise UserError(f"GDKDS.FOREGROUND and GDKDS.BACKGROUND must each name a loss of its own, not {name!r}")
        part = cfg.clone()
        part.defrost()
        part.NAME = name
        parts.append(build_loss(part, views=1))
    return ForegroundBackground(*parts)


@LOSS_REGISTRY.register()
def aekt(cfg: Any) -> AEKTLoss:
    """LOSS.NAME aekt, keys AEKT."""
    node = cfg.AEKT
    return AEKTLoss(node.EXPLICIT_WEIGHT, node.IMPLICIT_WEIGHT, max_ratio=node.MAX_RATIO, **common_options(cfg))


@LOSS_REGISTRY.register()
def dist(cfg: Any) -> DISTLoss:
    """LOSS.NAME dist, keys DIST."""
    return DISTLoss(cfg.DIST.BETA, cfg.DIST.GAMMA, **common_options(cfg))


def two_view_options(cfg: Any) -> dict[str, Any]:
    """The keyword arguments that every `TwoViewLoss` takes."""
    node = cfg.TWO_VIEW
    split = {"alpha": node.ALPHA, "beta": node.BETA} if node.DECOUPLED else {}
    return common_options(cfg) | split | {"released": node.RELEASED}


@LOSS_REGISTRY.register()
def mlkd(cfg: Any) -> MLKDLoss:
    """LOSS.NAME mlkd, keys MLKD and TWO_VIEW."""
    options = two_view_options(cfg)
    options.pop("temperature")
    node = cfg.MLKD
    weights = {"class_weight": node.CLASS_WEIGHT, "batch_weight": node.BATCH_WEIGHT}
    return MLKDLoss(node.TEMPERATURES, options.pop("weight") * node.WEIGHT, **weights, **options)


@LOSS_REGISTRY.register()
def crld(cfg: Any) -> CRLDLoss:
    """LOSS.NAME crld, keys CRLD and TWO_VIEW."""
    node = cfg.CRLD
    weights = (node.WITHIN_WEIGHT, node.CROSS_WEIGHT, node.WITHIN_THRESHOLD, node.CROSS_THRESHOLD)
    options = two_view_options(cfg)
    return CRLDLoss(options.pop("temperature"), *weights, **options)
