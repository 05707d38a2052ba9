"""Losses between feature maps: ReviewKD's, and how a user adds another."""

import pytest
import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from kd_core import FEATURE_REGISTRY, FeatureLoss, ReviewLoss, add_feature_config, hierarchical_context_loss
from kd_core.losses.feature_config import build_feature_loss, check_feature, feature_options
from kd_core.utils.errors import UserError


@FEATURE_REGISTRY.register()
class MeanLoss(FeatureLoss):
    """A user's loss: the channels' means through one linear layer a level."""

    terms = ("means",)

    def __init__(self, cfg: CfgNode, student_channels: list[int], teacher_channels: list[int]) -> None:
        super().__init__(**feature_options(cfg))
        pairs = zip(student_channels, teacher_channels, strict=True)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(*pair) for pair in pairs)

    def compare(self, student_maps: list[Tensor], teacher_maps: list[Tensor]) -> dict[str, Tensor]:
        levels = zip(self.layers, student_maps, teacher_maps, strict=True)
        return {"means": sum(F.mse_loss(layer(s.mean((2, 3))), t.mean((2, 3))) for layer, s, t in levels)}


def node(**values: object) -> CfgNode:
    """KD.FEATURE as kd_cls has it."""
    cfg = CfgNode()
    add_feature_config(cfg)
    cfg.WARMUP_EPOCHS = 0.0
    cfg.update(values)
    return cfg


def maps(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.randn(2, channels, size, size) for channels, size in shapes]


def test_review_is_the_context_loss_of_the_fused_maps_with_weight_and_warmup() -> None:
    loss = build_feature_loss(node(NAME="review", WEIGHT=3.0, WARMUP_EPOCHS=5.0), [4, 6], [8, 3], "WARMUP_EPOCHS", 20)
    student, teacher = maps((4, 8), (6, 4)), maps((8, 8), (3, 4))
    plain = hierarchical_context_loss(loss.fusion(student, teacher), teacher).item()
    assert loss(student, teacher)["review"].item() == pytest.approx(3 * plain)
    assert loss(student, teacher, progress=1 / 8)["review"].item() == pytest.approx(1.5 * plain)
    assert loss(student, teacher, progress=0.0)["review"].item() == 0
    assert loss.streams == {"review": "ncg"}
    other = build_feature_loss(node(NAME="review", STREAM="tog"), [4], [8], "WARMUP_EPOCHS", 20)
    assert other.streams == {"review": "tog"}


def test_equal_features_give_a_review_of_zero_with_zero_gradient() -> None:
    loss, student = ReviewLoss([4, 6], [8, 3]), maps((4, 8), (6, 4))
    fused = loss.fusion(student, maps((8, 8), (3, 4)))
    value = loss(student, [m.detach() for m in fused])["review"]
    value.backward()
    assert value.item() == 0 and all(p.grad.count_nonzero() == 0 for p in loss.parameters())


@pytest.mark.parametrize(("channels", "given", "mid"), [([4, 48], 0, 48), ([4, 2048], 0, 512), ([4, 48], 7, 7)])
def test_the_fusion_is_as_wide_as_the_coarsest_map_and_at_most_512(channels: list[int], given: int, mid: int) -> None:
    cfg = node(NAME="review")
    cfg.REVIEW.MID_CHANNELS = given
    loss = build_feature_loss(cfg, channels, channels, "WARMUP_EPOCHS", 20)
    assert loss.fusion.reduce[0][0].out_channels == mid


def test_a_loss_of_ones_own_is_a_registered_class() -> None:
    loss = build_feature_loss(node(NAME="MeanLoss", WEIGHT=0.5, STREAM="tcg"), [4, 6], [8, 3], "WARMUP_EPOCHS", 20)
    terms = loss(maps((4, 8), (6, 4)), maps((8, 16), (3, 8)))
    terms["means"].backward()
    assert loss.streams == {"means": "tcg"} and all(p.grad.abs().sum() > 0 for p in loss.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"NAME": "reviews"}, r"KD.FEATURE.NAME is 'reviews', but the feature losses are: none, MeanLoss, review"),
        ({"WEIGHT": -1.0}, r"KD.FEATURE: weight must not be below 0, and is -1.0"),
        ({"WARMUP": 2.0}, r"KD.FEATURE: warmup is a share of training progress, in \[0, 1\], not 2.0"),
        ({"STREAM": "task"}, r"KD.FEATURE: stream must be one of tog, tcg, ncg, not 'task'"),
        ({"WARMUP": 0.5, "WARMUP_EPOCHS": 3.0}, r"KD.FEATURE.WARMUP_EPOCHS 3.0 and KD.FEATURE.WARMUP 0.5 both give"),
        ({"WARMUP_EPOCHS": -3.0}, r"KD.FEATURE.WARMUP_EPOCHS is -3.0, the length of the warm-up: it must be 0 or more"),
    ],
)
def test_a_value_that_no_feature_loss_takes_is_refused_by_its_key(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_feature(node(**values), "WARMUP_EPOCHS", 20)


def test_a_width_below_one_is_refused() -> None:
    cfg = node(NAME="review")
    cfg.REVIEW.MID_CHANNELS = -8
    with pytest.raises(UserError, match=r"KD.FEATURE.REVIEW.MID_CHANNELS is -8, expected a whole number ≥ 0"):
        check_feature(cfg, "WARMUP_EPOCHS", 20)
