"""From the SOLVER node of a config, detector's or classifier's, to a stream optimizer and its momenta."""

from collections.abc import Iterable
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor

from kd_core.optim.base import StreamOptimizer
from kd_core.optim.gsnr import AutoMomenta
from kd_core.optim.presets import deepkd_sgd, dot_sgd
from kd_core.optim.stream_adamw import StreamAdamW
from kd_core.utils.errors import UserError

STREAM_OPTIMIZERS = ("dot_sgd", "deepkd_sgd", "stream_adamw")


def build_stream_optimizer(solver: CfgNode, groups: list[dict[str, Any]]) -> StreamOptimizer:
    """The optimizer of `solver.OPTIMIZER`, one of `STREAM_OPTIMIZERS`, over parameter groups.

    Raises:
        UserError: momenta outside [0, 1) and other values that the optimizer refuses, with their keys.
    """
    deltas = {"tog": solver.DEEPKD.DELTA_TOG, "tcg": solver.DEEPKD.DELTA_TCG, "ncg": solver.DEEPKD.DELTA_NCG}
    sgd = {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV, "step": solver.STEP}
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    try:
        if solver.OPTIMIZER == "dot_sgd":
            return dot_sgd(groups, **common, **sgd, delta=solver.DOT.DELTA)
        if solver.OPTIMIZER == "deepkd_sgd":
            return deepkd_sgd(groups, **common, **sgd, **{f"delta_{name}": delta for name, delta in deltas.items()})
        momenta = {stream: solver.MOMENTUM + delta for stream, delta in deltas.items()}
        return StreamAdamW(groups, **common, momenta=momenta)
    except ValueError as error:
        keys = f"DOT.DELTA {solver.DOT.DELTA}" if solver.OPTIMIZER == "dot_sgd" else f"DEEPKD {deltas}"
        raise UserError(f"SOLVER.OPTIMIZER {solver.OPTIMIZER}, MOMENTUM {solver.MOMENTUM}, {keys}: {error}") from error


def build_auto_momenta(
    solver: CfgNode, optimizer: StreamOptimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> AutoMomenta | None:
    """What `solver.MOMENTA` auto asks for, None otherwise.

    Raises:
        UserError: a window with fewer than two samples, or momenta outside [0, 1).
    """
    if solver.MOMENTA != "auto":
        return None
    gsnr = solver.GSNR
    try:
        return AutoMomenta(
            optimizer, named_parameters, gsnr.WINDOW, gsnr.PERIOD, gsnr.SAMPLE, solver.MOMENTUM, gsnr.SPAN
        )
    except ValueError as error:
        raise UserError(f"SOLVER.GSNR: {error}") from error
