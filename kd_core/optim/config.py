"""From the SOLVER node of a config, detector's or classifier's, to a stream optimizer and its momenta."""

from collections.abc import Collection, Iterable
from typing import Any

from fvcore.common.config import CfgNode
from torch import Tensor

from kd_core.losses.feature_config import distils
from kd_core.optim.base import StreamOptimizer
from kd_core.optim.gsnr import AutoMomenta
from kd_core.optim.presets import PRESETS, deepkd_sgd, dot_sgd
from kd_core.optim.stream_adamw import StreamAdamW
from kd_core.utils.errors import UserError

STREAM_OPTIMIZERS = ("dot_sgd", "deepkd_sgd", "stream_adamw")


def check_preset(solver: CfgNode) -> None:
    """Refuse an unknown SOLVER.DEEPKD.PRESET, and one that SOLVER.STEP contradicts.

    Raises:
        UserError: names the key, its value and what is expected.
    """
    preset = solver.DEEPKD.PRESET
    if preset not in ("", *PRESETS):
        raise UserError(f"SOLVER.DEEPKD.PRESET is {preset!r}, expected {' or '.join(PRESETS)}")
    if preset == "released" and solver.OPTIMIZER == "deepkd_sgd" and solver.STEP != "paper":
        raise UserError(
            f"SOLVER.DEEPKD.PRESET released means the released code's step, but SOLVER.STEP is {solver.STEP!r}: set "
            "SOLVER.STEP paper, or PRESET paper and DELTA_TOG equal to DELTA_TCG"
        )


def check_streams(solver: CfgNode, kd: CfgNode, streamed: Collection[str]) -> None:
    """Refuse streams, or momenta drawn from them, where there are none, and what `check_preset` refuses.

    Args:
        solver, kd: the nodes SOLVER and KD of a config.
        streamed: the values of SOLVER.OPTIMIZER that keep the streams apart.
    Raises:
        UserError: names the key, its value and what is expected.
    """
    check_preset(solver)
    if not distils(kd) and solver.OPTIMIZER in ("dot_sgd", "deepkd_sgd"):
        raise UserError(
            f"SOLVER.OPTIMIZER {solver.OPTIMIZER} gives distillation a momentum of its own, but KD.LOSS.NAME is none: "
            "set SOLVER.OPTIMIZER sgd, or a distillation loss"
        )
    if solver.MOMENTA == "auto" and (not distils(kd) or solver.OPTIMIZER not in streamed):
        raise UserError(
            f"SOLVER.MOMENTA auto compares the gradient streams of a distillation loss, but SOLVER.OPTIMIZER is "
            f"{solver.OPTIMIZER} and KD.LOSS.NAME {kd.LOSS.NAME}: leave it empty, or set e.g. SOLVER.OPTIMIZER "
            "deepkd_sgd"
        )


def stream_deltas(solver: CfgNode) -> dict[str, float]:
    """What `solver.DEEPKD` adds to MOMENTUM for each stream. PRESET released: DELTA_TCG for tog too."""
    node = solver.DEEPKD
    tog = node.DELTA_TCG if node.PRESET == "released" else node.DELTA_TOG
    return {"tog": tog, "tcg": node.DELTA_TCG, "ncg": node.DELTA_NCG}


def build_stream_optimizer(solver: CfgNode, groups: list[dict[str, Any]]) -> StreamOptimizer:
    """The optimizer of `solver.OPTIMIZER`, one of `STREAM_OPTIMIZERS`, over parameter groups.

    Raises:
        UserError: what `check_preset` refuses; momenta outside [0, 1) and other values that the optimizer refuses,
            with their keys.
    """
    check_preset(solver)
    deltas = stream_deltas(solver)
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
    solver: CfgNode,
    optimizer: StreamOptimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    streams: Collection[str],
) -> AutoMomenta | None:
    """What `solver.MOMENTA` auto asks for, None otherwise.

    Args:
        streams: those that the losses have.
    Raises:
        UserError: a window with fewer than two samples, or momenta outside [0, 1).
    """
    if solver.MOMENTA != "auto":
        return None
    gsnr = solver.GSNR
    try:
        return AutoMomenta(
            optimizer, named_parameters, gsnr.WINDOW, gsnr.PERIOD, gsnr.SAMPLE, solver.MOMENTUM, gsnr.SPAN, streams
        )
    except ValueError as error:
        raise UserError(
            f"SOLVER.GSNR.WINDOW {gsnr.WINDOW} (warmup), PERIOD {gsnr.PERIOD} (every), SAMPLE {gsnr.SAMPLE}, SPAN "
            f"{gsnr.SPAN}, SOLVER.MOMENTUM {solver.MOMENTUM} (base): {error}"
        ) from error
