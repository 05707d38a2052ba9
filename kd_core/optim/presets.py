"""The papers' trainers as settings of StreamSGD."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kd_core.optim.stream_sgd import StreamSGD

PRESETS = ("paper", "released")


def deepkd_sgd(
    params: Iterable[Any],
    lr: float | Tensor,
    momentum: float = 0.9,
    delta_tog: float | None = None,
    delta_tcg: float | None = None,
    delta_ncg: float | None = None,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: str = "paper",
    preset: str = "paper",
    delta: float | None = None,
) -> StreamSGD:
    """DeepKD (arXiv 2505.15133): each stream has the momentum μ plus its own delta.

    preset="paper" is tog μ+Δ, tcg μ−Δ, ncg μ+Δ. preset="released" is what the released code computes: its task gradient
    decays with tcg's momentum, so tog and tcg μ−Δ, ncg μ+Δ. Either has two sets: two backward passes and two buffers.
    The released configs also use delta_ncg .05 (45 of 72) and delta_tcg −.1 (11 of 72). The paper leaves weight decay
    open: with tog (ours).

    Args:
        delta: Δ of all three streams, by default .075 (with the preset's signs).
        delta_tog, delta_tcg, delta_ncg: replace one stream's delta, sign included. Under "released", tog follows
            `delta_tcg` unless `delta_tog` is given.
    Raises:
        ValueError: an unknown preset; a momentum outside [0, 1).
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}: it must be 'paper' or 'released'")
    delta = 0.075 if delta is None else delta
    tcg = -delta if delta_tcg is None else delta_tcg
    ncg = delta if delta_ncg is None else delta_ncg
    preset_tog = tcg if preset == "released" else delta
    tog = preset_tog if delta_tog is None else delta_tog
    momenta = {"tog": momentum + tog, "tcg": momentum + tcg, "ncg": momentum + ncg}
    return StreamSGD(params, lr, momenta, weight_decay, "tog", nesterov, step, base_momentum=momentum)


def dot_sgd(
    params: Iterable[Any],
    lr: float | Tensor,
    momentum: float = 0.9,
    delta: float = 0.075,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: str = "paper",
) -> StreamSGD:
    """DOT (ICCV 2023): momenta tog μ−Δ, tcg and ncg μ+Δ; weight decay with tog. Δ is .09 on ImageNet."""
    return deepkd_sgd(params, lr, momentum, -delta, delta, delta, weight_decay, nesterov, step)


def deepkd_sgd_released(
    params: Iterable[Any],
    lr: float | Tensor,
    momentum: float = 0.9,
    delta: float = 0.075,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: str = "paper",
) -> StreamSGD:
    """`deepkd_sgd(preset="released")`: momenta tog and tcg μ−Δ, ncg μ+Δ."""
    return deepkd_sgd(
        params, lr, momentum, weight_decay=weight_decay, nesterov=nesterov, step=step, preset="released", delta=delta
    )
