"""The presets are settings of StreamSGD, and nothing more."""

from pathlib import Path

import pytest
from torch import nn, zeros

from kd_core.optim import StreamSGD, deepkd_sgd, deepkd_sgd_released, dot_sgd


@pytest.mark.parametrize(
    ("preset", "expected", "sets"),
    [
        (deepkd_sgd, (0.975, 0.825, 0.975), (("tog", "ncg"), ("tcg",))),
        (dot_sgd, (0.825, 0.975, 0.975), (("tog",), ("tcg", "ncg"))),
        (deepkd_sgd_released, (0.825, 0.825, 0.975), (("tog", "tcg"), ("ncg",))),
    ],
)
def test_a_preset_has_the_papers_momenta_in_two_sets(preset, expected: tuple[float, ...], sets) -> None:
    optimizer = preset([nn.Parameter(zeros(1))], lr=0.05, weight_decay=5e-4)
    group = optimizer.param_groups[0]
    assert type(optimizer) is StreamSGD
    assert tuple(group["momenta"][s] for s in ("tog", "tcg", "ncg")) == pytest.approx(expected, abs=1e-12)
    assert optimizer.stream_sets == sets
    assert (group["decay_stream"], group["weight_decay"], group["base_momentum"]) == ("tog", 5e-4, 0.9)


def test_the_deltas_may_be_chosen() -> None:
    p = [nn.Parameter(zeros(1))]
    momenta = deepkd_sgd(p, 0.1, delta_tog=0.075, delta_tcg=-0.1, delta_ncg=0.05).param_groups[0]["momenta"]
    assert momenta == pytest.approx({"tog": 0.975, "tcg": 0.8, "ncg": 0.95})
    assert dot_sgd(p, 0.1, delta=0.09).param_groups[0]["momenta"] == pytest.approx(
        {"tog": 0.81, "tcg": 0.99, "ncg": 0.99}
    )


def test_deltas_of_zero_are_one_set() -> None:
    optimizer = deepkd_sgd([nn.Parameter(zeros(1))], 0.1, delta_tog=0, delta_tcg=0, delta_ncg=0)
    assert optimizer.stream_sets == (("tog", "tcg", "ncg"),)


def test_deltas_that_lead_out_of_range_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"the momentum of stream 'tog' is 1.05: it must be in \[0, 1\)"):
        deepkd_sgd([nn.Parameter(zeros(1))], 0.1, delta_tog=0.15)


def momenta(**options: object) -> dict[str, float]:
    return deepkd_sgd([nn.Parameter(zeros(1))], 0.1, **options).param_groups[0]["momenta"]


def test_one_delta_sets_all_three() -> None:
    assert momenta(delta=0.05) == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.95})
    assert momenta(delta=0.05, delta_ncg=0.025) == pytest.approx({"tog": 0.95, "tcg": 0.85, "ncg": 0.925})


def test_the_released_preset_steps_the_task_by_tcgs_momentum() -> None:
    assert momenta(preset="paper") == momenta()
    released = deepkd_sgd_released([nn.Parameter(zeros(1))], 0.1).param_groups[0]["momenta"]
    assert momenta(preset="released") == released == pytest.approx({"tog": 0.825, "tcg": 0.825, "ncg": 0.975})
    assert momenta(preset="released", delta=0.05) == pytest.approx({"tog": 0.85, "tcg": 0.85, "ncg": 0.95})
    assert momenta(preset="released", delta_tcg=-0.1) == pytest.approx({"tog": 0.8, "tcg": 0.8, "ncg": 0.975})
    assert momenta(preset="released", delta_tog=0.0) == pytest.approx({"tog": 0.9, "tcg": 0.825, "ncg": 0.975})


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError, match="preset is 'ours': it must be 'paper' or 'released'"):
        momenta(preset="ours")


DOCS = Path(__file__).resolve().parents[3] / "docs" / "methods" / "deepkd.md"
RELEASED = {"preset": "released"}
EFFECTIVE_WEIGHTS = {
    "SGD, momentum .9": (deepkd_sgd, {"delta": 0.0}),
    "paper, Δ .075": (deepkd_sgd, {}),
    "paper, Δ .05": (deepkd_sgd, {"delta": 0.05}),
    "released, Δ_ncg .05": (deepkd_sgd, {**RELEASED, "delta_ncg": 0.05}),
    "released, Δ_ncg .075": (deepkd_sgd, RELEASED),
    "DOT, Δ .075": (dot_sgd, {}),
    "DOT on ImageNet, Δ .09": (dot_sgd, {"delta": 0.09}),
}


@pytest.mark.parametrize("setting", EFFECTIVE_WEIGHTS)
def test_the_table_of_effective_weights_in_the_docs_is_of_these_momenta(setting: str) -> None:
    build, options = EFFECTIVE_WEIGHTS[setting]
    found = build([nn.Parameter(zeros(1))], 0.1, **options).param_groups[0]["momenta"]
    weights = [1 / (1 - found[stream]) for stream in ("tog", "tcg", "ncg")]
    row = " | ".join(f"{weight:.1f} ({weight / 10:.2f})" for weight in weights)
    assert f"| {setting} | {row} |" in DOCS.read_text(encoding="utf-8")
