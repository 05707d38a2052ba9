"""KD, DKD and GDKD of maps beside what GDKD's released segmentation code gives, in float64."""

import json

import pytest
import torch
from torch.testing import assert_close

from kd_core import DKDLoss, GDKDLoss, KDLoss
from kd_det.modeling.pixels import PixelMap, PixelOptions, pixel_rows

from ..conftest import ROOT

GOLDEN = json.loads((ROOT / "tests/golden/segmentation.json").read_text())
LOSSES = {"kd": KDLoss, "dkd": DKDLoss, "gdkd": GDKDLoss}
IGNORED = -1  # of the released DKD


def of_map(case, shape, student, teacher, labels):
    """Value and gradient (B, C, h, w) of a case on its maps, through our rows of pixels."""
    student, teacher = (torch.tensor(side, dtype=torch.float64).view(shape) for side in (student, teacher))
    labels = torch.tensor(labels).view(shape[0], *shape[2:])
    options = PixelOptions(ignore="none" if case["labels"] == "none" else "label")
    kept = pixel_rows(PixelMap(student.requires_grad_(), labels), teacher, options, IGNORED)
    value = sum(LOSSES[case["method"]](**case["args"])(*kept).values())
    return value, torch.autograd.grad(value, student)[0]


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['method']}-{case['labels']}")
def test_value_and_gradient_of_a_map_are_those_of_the_released_code(case):
    labels = GOLDEN["ignored" if case["labels"] == "ignored" else "labels"]
    value, gradient = of_map(case, GOLDEN["shape"], GOLDEN["student"], GOLDEN["teacher"], labels)
    assert value.item() == pytest.approx(case["value"], rel=0, abs=1e-9)
    assert_close(gradient.flatten(), torch.tensor(case["grad"], dtype=torch.float64), rtol=0, atol=1e-9)


def test_where_the_released_clamp_cuts_the_gradient_off_ours_is_that_of_the_formula():
    case = GOLDEN["clamped"]  # a pixel whose student is sure that the teacher's first class is wrong
    value, gradient = of_map(case, (1, 4, 1, 1), case["student"], case["teacher"], [0])
    student, teacher = (torch.tensor(case[side], dtype=torch.float64) for side in ("student", "teacher"))
    q, log_p = teacher.softmax(0)[0], student.log_softmax(0)[0]
    expected = q * (q.log() - log_p) + (1 - q) * ((1 - q).log() - torch.log1p(-log_p.exp()))
    assert_close(value, expected) and value > case["value"] + 20
    assert case["grad"] == [0.0] * 4 and gradient[0, 0, 0, 0].item() == pytest.approx(-q.item())
