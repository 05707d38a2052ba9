"""ReviewKD: the fusion and the hierarchical context loss."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_core.losses import ReviewFusion, hierarchical_context_loss

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
HCL = json.loads((GOLDEN / "companions.json").read_text())["hcl"]
FUSIONS = json.loads((GOLDEN / "review_fusion.json").read_text())["cases"]


def tensors(values: list) -> list[Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def fusion_of(case: dict) -> ReviewFusion:
    """The module with the fixture's weights."""
    fusion = ReviewFusion(case["student_channels"], case["teacher_channels"], case["mid_channels"]).double()
    for level, weights in enumerate(case["levels"]):
        named = dict(zip(weights, tensors(list(weights.values())), strict=True))
        for name in ("reduce", "expand"):
            conv, norm = getattr(fusion, name)[level]
            conv.weight.data = named[f"{name}.weight"]
            norm.weight.data, norm.bias.data = named[f"{name}.norm.weight"], named[f"{name}.norm.bias"]
        if level < len(fusion.attend):
            fusion.attend[level].weight.data = named["attend.weight"]
            fusion.attend[level].bias.data = named["attend.bias"]
    return fusion


def nearest(maps: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resizing, pixel by pixel."""
    rows = [i * maps.shape[2] // height for i in range(height)]
    columns = [j * maps.shape[3] // width for j in range(width)]
    return maps[:, :, rows][:, :, :, columns]


def batch_norm(maps: Tensor) -> Tensor:
    mean = maps.mean((0, 2, 3), keepdim=True)
    return (maps - mean) / (maps.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()


def slow_fusion(fusion: ReviewFusion, maps: list[Tensor]) -> list[Tensor]:
    """The formula of papers and docs, level by level, for a fresh module (norms of weight 1 and bias 0)."""
    outputs: list[Tensor] = []
    y = None
    for level in range(len(maps) - 1, -1, -1):
        u = batch_norm(torch.einsum("nchw,mc->nmhw", maps[level], fusion.reduce[level][0].weight[:, :, 0, 0]))
        if y is not None:
            up = nearest(y, *u.shape[2:])
            attend = fusion.attend[level]
            score = torch.einsum("nchw,mc->nmhw", torch.cat([u, up], 1), attend.weight[:, :, 0, 0])
            a = 1 / (1 + torch.exp(-(score + attend.bias[:, None, None])))
            u = a[:, 0:1] * u + a[:, 1:2] * up
        y = u
        outputs.insert(0, batch_norm(F.conv2d(y, fusion.expand[level][0].weight, padding=1)))
    return outputs


def test_hcl_is_the_released_value_and_gradient() -> None:
    student, teacher = tensors(HCL["student"]), tensors(HCL["teacher"])
    for x in student:
        x.requires_grad_()
    value = hierarchical_context_loss(student, teacher)
    assert value.item() == pytest.approx(HCL["value"], abs=1e-9)
    for gradient, golden in zip(torch.autograd.grad(value, student), tensors(HCL["grad"]), strict=True):
        torch.testing.assert_close(gradient, golden, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", FUSIONS, ids=["equal sizes", "teacher of other sizes"])
def test_the_fusion_is_that_of_the_released_code_with_the_same_weights(case: dict) -> None:
    fusion, student = fusion_of(case), [x.requires_grad_() for x in tensors(case["student"])]
    teacher_maps = [torch.zeros(1, 1, size, size) for size in case["out_size"]]
    fused = fusion(student, teacher_maps)
    torch.testing.assert_close(fused, tensors(case["out"]), rtol=0, atol=1e-9)
    value = sum((out * probe).sum() for out, probe in zip(fused, tensors(case["probe"]), strict=True))
    gradients = torch.autograd.grad(value, student, retain_graph=True)
    torch.testing.assert_close(list(gradients), tensors(case["grad_student"]), rtol=0, atol=1e-9)
    for level, golden in enumerate(case["grad_norm_parameters"]):
        blocks = [fusion.reduce[level], fusion.expand[level], *fusion.attend[level : level + 1]]
        parameters = [p for block in blocks for p in block.parameters()]
        norms = [g.norm() for g in torch.autograd.grad(value, parameters, retain_graph=True)]
        assert torch.stack(norms).norm().item() == pytest.approx(golden, rel=1e-9)


@pytest.mark.parametrize(
    ("student_channels", "teacher_channels", "mid", "sizes"),
    [([5], [3], 4, [(4, 6)]), ([2, 6, 3], [4, 1, 5], 4, [(9, 7), (5, 4), (3, 2)]), ([3] * 5, [2] * 5, 2, [(8, 8)] * 5)],
)
def test_the_fusion_is_the_formula_for_any_levels_channels_and_sizes(
    student_channels: list[int], teacher_channels: list[int], mid: int, sizes: list[tuple[int, int]]
) -> None:
    fusion = ReviewFusion(student_channels, teacher_channels, mid).double()
    maps = [torch.randn(3, c, *size, dtype=torch.float64) for c, size in zip(student_channels, sizes, strict=True)]
    fused = fusion(maps)
    assert [tuple(out.shape[1:]) for out in fused] == [(c, *s) for c, s in zip(teacher_channels, sizes, strict=True)]
    torch.testing.assert_close(fused, slow_fusion(fusion, maps), rtol=0, atol=1e-9)


def test_a_teacher_of_another_size_gets_maps_of_its_size() -> None:
    fusion = ReviewFusion([4, 8], [6, 2], 5)
    student = [torch.randn(2, 4, 8, 10), torch.randn(2, 8, 4, 5)]
    teacher = [torch.randn(2, 6, 12, 15), torch.randn(2, 2, 6, 8)]
    fused = fusion(student, teacher)
    assert [out.shape for out in fused] == [t.shape for t in teacher]
    hierarchical_context_loss(fused, teacher).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fusion.parameters())


def test_equal_features_give_zero_with_zero_gradient() -> None:
    maps = [torch.randn(2, 3, size, size, requires_grad=True) for size in (8, 4, 2, 1)]
    value = hierarchical_context_loss(maps, [m.detach().clone() for m in maps])
    value.backward()
    assert value.item() == 0
    assert all(m.grad.count_nonzero() == 0 for m in maps)


def test_the_pools_count_only_where_they_are_smaller_than_the_height() -> None:
    ones = torch.ones(1, 1, 1, 9)
    assert hierarchical_context_loss([ones * 3], [ones]).item() == pytest.approx(4.0)
    column = torch.tensor([1.0, -1.0]).view(1, 1, 2, 1)  # its 1×1 pool is 0; that pool weighs ½ of 1.5
    assert hierarchical_context_loss([column], [torch.zeros_like(column)]).item() == pytest.approx(1 / 1.5)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (torch.randn(2, 3, 4, 4, requires_grad=True) for _ in range(2))
    hierarchical_context_loss([student], [teacher]).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_the_loss_in_float32(dtype: torch.dtype) -> None:
    student = (torch.rand(2, 3, 8, 8) * 6e4).to(dtype).requires_grad_()
    teacher = (torch.rand(2, 3, 8, 8) * -6e4).to(dtype)
    wide = hierarchical_context_loss([student.detach().float()], [teacher.float()])
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            value = hierarchical_context_loss([student], [teacher])
        assert value.dtype == torch.float32
        assert value.item() == wide.item()
        assert torch.isfinite(torch.autograd.grad(value, student)[0]).all()


def test_no_images_give_zero_with_a_gradient() -> None:
    student = torch.zeros(0, 3, 8, 8, requires_grad=True)
    value = hierarchical_context_loss([student], [student.detach()])
    value.backward()
    assert value.item() == 0
    assert student.grad.shape == student.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 4), r"must name the same levels, one or more, not \[\] and \[\]"),
        (([4, 8], [4], 4), r"must name the same levels, one or more, not \[4, 8\] and \[4\]"),
        (([4, 0], [4, 8], 4), r"student_channels must be whole numbers >= 1, not \[4, 0\]"),
        (([4, 8], [4, 2.5], 4), r"teacher_channels must be whole numbers >= 1, not \[4, 2.5\]"),
        (([4], [4], 0), r"mid_channels must be whole numbers >= 1, not \[0\]"),
    ],
)
def test_a_fusion_that_cannot_be_built_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReviewFusion(*arguments)


def test_maps_that_do_not_fit_are_named() -> None:
    fusion, maps = ReviewFusion([4, 8], [3, 3], 2), [torch.randn(2, 4, 4, 4), torch.randn(2, 8, 2, 2)]
    with pytest.raises(ValueError, match=r"\[8, 4\] channels, but .* student_channels \[4, 8\], fine to coarse"):
        fusion(maps[::-1])
    with pytest.raises(ValueError, match=r"there are 1 teacher maps for 2 student maps"):
        fusion(maps, maps[:1])
    with pytest.raises(ValueError, match=r"fused maps are .*\(2, 4, 4, 4\).* and the teacher's .*: shapes must agree"):
        hierarchical_context_loss(maps, maps[::-1])
    with pytest.raises(ValueError, match=r"the fused maps are \[\]"):
        hierarchical_context_loss([], [])
