"""The config keys of the stream optimizers, and what comes out of them."""

import pytest
import torch
from fvcore.common.config import CfgNode

from kd_core.optim.config import build_auto_momenta, build_stream_optimizer
from kd_core.utils.errors import UserError


def solver(**keys: object) -> CfgNode:
    """A SOLVER node with values of its own in every key."""
    node = {"OPTIMIZER": "deepkd_sgd", "BASE_LR": 0.1, "MOMENTUM": 0.8, "WEIGHT_DECAY": 0.02, "NESTEROV": True}
    node |= {"STEP": "matched", "DOT": {"DELTA": 0.1}, "MOMENTA": "fixed"}
    node["DEEPKD"] = {"PRESET": "paper", "DELTA_TOG": 0.01, "DELTA_TCG": -0.02, "DELTA_NCG": 0.03}
    node["GSNR"] = {"PERIOD": 3, "WINDOW": 9, "SAMPLE": 0.5, "SPAN": 0.04}
    return CfgNode({**node, **keys})


def groups() -> list[dict]:
    return [{"params": [torch.nn.Parameter(torch.ones(4, 6))]}]


@pytest.mark.parametrize(
    ("optimizer", "tog", "tcg", "ncg"),
    [("deepkd_sgd", 0.81, 0.78, 0.83), ("dot_sgd", 0.7, 0.9, 0.9), ("stream_adamw", 0.81, 0.78, 0.83)],
)
def test_keys_reach_the_optimizer(optimizer: str, tog: float, tcg: float, ncg: float) -> None:
    keys = {"NESTEROV": False, "STEP": "paper"} if optimizer == "stream_adamw" else {}
    (group,) = build_stream_optimizer(solver(OPTIMIZER=optimizer, **keys), groups()).param_groups
    assert group["momenta"] == pytest.approx({"tog": tog, "tcg": tcg, "ncg": ncg})
    assert (group["lr"], group["weight_decay"]) == (0.1, 0.02)
    if not keys:
        assert (group["nesterov"], group["step"]) == (True, "matched")


def test_keys_of_the_measured_ratio_reach_it() -> None:
    optimizer = build_stream_optimizer(solver(), groups())
    named = [("weight", optimizer.param_groups[0]["params"][0])]
    assert build_auto_momenta(solver(), optimizer, named, ("tog", "ncg")) is None
    momenta = build_auto_momenta(solver(MOMENTA="auto"), optimizer, named, ("tog", "ncg"))
    assert (momenta.warmup, momenta.gsnr.every, momenta.base, momenta.span) == (9, 3, 0.8, 0.04)
    assert momenta.gsnr.stride == 2 and set(momenta.gsnr.count) == {"tog", "ncg"}  # one element of two
    wide = solver(MOMENTA="auto", GSNR={"PERIOD": 3, "WINDOW": 9, "SAMPLE": 0.5, "SPAN": 0.3})
    with pytest.raises(UserError, match=r"SPAN 0\.3, SOLVER\.MOMENTUM 0\.8 \(base\): "):
        build_auto_momenta(wide, optimizer, named, ("tog", "ncg"))
