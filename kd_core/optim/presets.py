"""The papers' trainers as settings of StreamSGD."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from kd_core.optim.stream_sgd import StreamSGD


def deepkd_sgd(
    params: Iterable[Any],
    lr: float | Tensor,
    momentum: float = 0.9,
    delta_tog: float = 0.075,
    delta_tcg: float = -0.075,
    delta_ncg: float = 0.075,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    step: str = "paper",
) -> StreamSGD:
    """DeepKD (arXiv 2505.15133): momenta tog μ+Δ, tcg μ−Δ, ncg μ+Δ.

    With the paper's deltas tog and ncg are one set: two backward passes and two buffers. The released configs also use
    delta_ncg .05 (45 of 72) and delta_tcg −.1 (11 of 72). The paper leaves weight decay open: with tog (ours).
    """
    momenta = {"tog": momentum + delta_tog, "tcg": momentum + delta_tcg, "ncg": momentum + delta_ncg}
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
    """DeepKD's released code, for comparison: its task gradient decays with tcg's momentum (μ−Δ, μ−Δ, μ+Δ)."""
    return deepkd_sgd(params, lr, momentum, -delta, -delta, delta, weight_decay, nesterov, step)
