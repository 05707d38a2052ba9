"""The config keys of the losses, and the losses that come out of them."""

import inspect
import io
import re
import tokenize
from functools import partial

import pytest
import torch
from fvcore.common.config import CfgNode
from yacs.config import CfgNode as YacsNode

from kd_core.losses import (
    LOSS_REGISTRY,
    AEKTLoss,
    CRLDLoss,
    DISTLoss,
    DKDLoss,
    ForegroundBackground,
    GDKD3Loss,
    GDKDLoss,
    KDLoss,
    MLKDLoss,
    add_loss_config,
    build_loss,
    common_options,
    config,
)

CLASSES = {
    "kd": KDLoss,
    "dkd": DKDLoss,
    "gdkd": GDKDLoss,
    "gdkd3": GDKD3Loss,
    "gdkds": ForegroundBackground,
    "aekt": AEKTLoss,
    "dist": partial(DISTLoss, temperature=4.0),  # LOSS.TEMPERATURE is 4, whatever the loss
    "mlkd": MLKDLoss,
    "crld": CRLDLoss,
}


def node(*overrides: object) -> CfgNode:
    cfg = CfgNode()
    add_loss_config(cfg)
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.mark.parametrize("name", CLASSES)
def test_the_default_keys_are_the_defaults_of_the_class(name: str) -> None:
    built, plain = build_loss(node("NAME", name)), CLASSES[name]() if name != "gdkds" else None
    assert type(built) is getattr(CLASSES[name], "func", CLASSES[name])
    if plain is not None:
        public = {key: value for key, value in vars(plain).items() if not key.startswith("_") and key != "training"}
        assert {key: getattr(built, key) for key in public} == public


def test_every_registered_loss_is_tested() -> None:
    assert {name for name, _ in LOSS_REGISTRY} == set(CLASSES)


def test_the_keys_work_in_a_node_of_yacs_too() -> None:
    cfg = YacsNode()
    add_loss_config(cfg)
    assert type(cfg.DKD) is YacsNode
    cfg.NAME = "dkd"
    cfg.freeze()
    assert build_loss(cfg).beta == 8.0


def test_keys_reach_the_loss() -> None:
    common = ("TEMPERATURE", 2.0, "WEIGHT", 0.5, "WARMUP", 0.25, "STANDARDIZE", True)
    dkd = build_loss(node("NAME", "dkd", "DKD.ALPHA", 2.0, "DKD.BETA", 3.0, "DKD.PARTITION", "teacher_top1", *common))
    assert (dkd.alpha, dkd.beta, dkd.partition) == (2.0, 3.0, "teacher_top1")
    assert (dkd.temperature, dkd.weight, dkd.warmup, dkd.standardize) == (2.0, 0.5, 0.25, True)
    own = ("GDKD.W0", 0.5, "GDKD.W1", 2.0, "GDKD.W2", 4.0, "GDKD.K", 3, "GDKD.KL", "both", "GDKD.AUTO_K", True)
    gdkd = build_loss(node("NAME", "gdkd", *own))
    assert (gdkd.w0, gdkd.w1, gdkd.w2, gdkd.k, gdkd.kl, gdkd.auto_k) == (0.5, 2.0, 4.0, 3, "both", True)
    own = ("GDKD3.W0", 0.5, "GDKD3.W1", 2.0, "GDKD3.W2", 4.0, "GDKD3.K", 3)
    gdkd3 = build_loss(node("NAME", "gdkd3", *own))
    assert (gdkd3.w0, gdkd3.w1, gdkd3.w2, gdkd3.k) == (0.5, 2.0, 4.0, 3)
    parts = build_loss(node("NAME", "gdkds", "GDKDS.FOREGROUND", "kd", "GDKDS.BACKGROUND", "gdkd"))
    assert (type(parts.fg_loss), type(parts.bg_loss)) == (KDLoss, GDKDLoss)
    weights = ("AEKT.EXPLICIT_WEIGHT", 2.0, "AEKT.IMPLICIT_WEIGHT", 4.0, "AEKT.MAX_RATIO", 5.0)
    aekt = build_loss(node("NAME", "aekt", *weights))
    assert (aekt.explicit_weight, aekt.implicit_weight, aekt.max_ratio) == (2.0, 4.0, 5.0)
    schedule = ("TOPK.ENABLED", True, "TOPK.START", 0.1, "TOPK.PLATEAU", 0.4, "TOPK.PHASES", [0.2, 0.3, 0.4])
    kd = build_loss(node("NAME", "kd", *schedule))
    assert (kd.topk.start, kd.topk.plateau, kd.topk.phases) == (0.1, 0.4, (0.2, 0.3, 0.4))


def test_keys_reach_the_losses_of_two_views() -> None:
    split = ("TWO_VIEW.DECOUPLED", True, "TWO_VIEW.ALPHA", 0.5, "TWO_VIEW.BETA", 3.0, "TWO_VIEW.RELEASED", True)
    own = ("MLKD.TEMPERATURES", [2.0], "MLKD.WEIGHT", 0.2, "MLKD.CLASS_WEIGHT", 0.3, "MLKD.BATCH_WEIGHT", 0.4)
    mlkd = build_loss(node("NAME", "mlkd", "WEIGHT", 3.0, *own, *split))
    assert (mlkd.class_weight, mlkd.batch_weight) == (0.3, 0.4)
    assert (mlkd.temperatures, mlkd.weight, mlkd.released) == ((2.0,), pytest.approx(0.6), True)
    assert (mlkd.decoupled, mlkd.alpha, mlkd.beta) == (True, 0.5, 3.0)
    weights = ("CRLD.WITHIN_WEIGHT", 3.0, "CRLD.CROSS_WEIGHT", 0.1)
    thresholds = ("CRLD.WITHIN_THRESHOLD", 0.5, "CRLD.CROSS_THRESHOLD", 0.25)
    crld = build_loss(node("NAME", "crld", "TEMPERATURE", 1.0, *weights, *thresholds))
    assert (crld.temperature, crld.within_weight, crld.cross_weight) == (1.0, 3.0, 0.1)
    assert (crld.within_threshold, crld.cross_threshold, crld.decoupled) == (0.5, 0.25, False)
    dist = build_loss(node("NAME", "dist", "DIST.BETA", 2.0, "DIST.GAMMA", 3.0))
    assert (dist.beta, dist.gamma) == (2.0, 3.0)


def test_a_loss_of_another_number_of_views_is_refused_where_the_views_are_known() -> None:
    assert type(build_loss(node("NAME", "crld"), 10, views=2)) is CRLDLoss
    with pytest.raises(ValueError, match=r"LOSS.NAME 'crld' compares 2 view.* of each image, but there are 1 here"):
        build_loss(node("NAME", "crld"), 10, views=1)
    with pytest.raises(ValueError, match=r"LOSS.NAME 'kd' compares 1 view.* of each image, but there are 2 here"):
        build_loss(node("NAME", "kd"), 10, views=2)


def test_the_detection_mix_takes_each_side_s_loss_from_its_own_keys() -> None:
    weights = ("GDKD3.W1", 0.25, "GDKD3.W2", 0.25, "DKD.BETA", 0.25)
    mix = build_loss(node("NAME", "gdkds", "TEMPERATURE", 1.0, *weights), num_classes=81)
    assert (mix.fg_loss.w1, mix.fg_loss.temperature, mix.bg_loss.beta) == (0.25, 1.0, 0.25)
    swapped = build_loss(node("NAME", "gdkds", "GDKDS.FOREGROUND", "kd", "GDKDS.BACKGROUND", "gdkd"))
    assert (type(swapped.fg_loss), type(swapped.bg_loss)) == (KDLoss, GDKDLoss)


def test_none_is_no_loss() -> None:
    assert build_loss(node()) is None


def test_whole_numbers_do_for_decimal_ones() -> None:
    cfg = node("NAME", "dkd")
    cfg.DKD.BETA = 8
    cfg.TEMPERATURE = 4
    beta = build_loss(cfg).beta
    assert beta == 8.0
    assert isinstance(beta, float)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("NAME", "dkdd"), "LOSS.NAME is 'dkdd', but the losses are: none, aekt, crld, dist, dkd, gdkd,"),
        (("NAME", "kd", "TEMPERATURE", 0.0), "LOSS kd: temperature must be above 0, not 0.0"),
        (("NAME", "gdkd", "GDKD.K", 10), "LOSS gdkd: k is 10, but it must be below the number of classes, 10"),
        (("NAME", "gdkds", "GDKD3.K", 12), "k is 12, but it must be below the number of classes, 10"),
        (("NAME", "gdkd", "TOPK.ENABLED", True), "LOSS gdkd: GDKDLoss has no non-target term for a top-k mask"),
        (("NAME", "dkd", "DKD.PARTITION", "label"), "LOSS dkd: partition must be one of target, teacher_top1"),
        (("NAME", "gdkds", "GDKDS.FOREGROUND", "gdkds"), "must each name a loss of its own, not 'gdkds'"),
        (("NAME", "gdkds", "GDKDS.BACKGROUND", "mlkd"), "LOSS.NAME 'mlkd' compares 2 view"),
        (("NAME", "mlkd", "MLKD.TEMPERATURES", [4.0, 0.0]), "LOSS mlkd: temperatures must be one or more numbers"),
        (("NAME", "crld", "CRLD.CROSS_THRESHOLD", 1.5), "cross_threshold is a confidence, in .0, 1., not 1.5"),
        (("NAME", "dist", "TOPK.ENABLED", True), "LOSS dist: DISTLoss has no non-target term for a top-k mask"),
        (("NAME", "gdkds", "GDKDS.BACKGROUND", "none"), "must each name a loss of its own, not 'none'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_when_the_loss_is_built(overrides: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_loss(node(*overrides), num_classes=10)


def test_a_loss_of_one_s_own_is_registered_in_three_lines() -> None:
    @LOSS_REGISTRY.register()
    def half_kd(cfg: CfgNode) -> KDLoss:
        return KDLoss(**common_options(cfg) | {"weight": 0.5})

    try:
        logits = torch.randn(2, 4, 5)
        terms = build_loss(node("NAME", "half_kd"))(*logits, torch.arange(4))
        torch.testing.assert_close(terms["tckd"], KDLoss(weight=0.5)(*logits, torch.arange(4))["tckd"])
    finally:
        del LOSS_REGISTRY._obj_map["half_kd"]


def test_a_comment_stands_above_every_key_or_group_of_keys() -> None:
    for function in (config.add_loss_config, config.add_gdkd_config, config.add_two_view_config):
        lines = inspect.getsource(function).splitlines()
        commented = {
            token.start[0]
            for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline)
            if token.type == tokenize.COMMENT
        }
        keys = [i for i, line in enumerate(lines, 1) if re.match(r"\s+node\.[A-Z0-9_.]+ = (?!new)", line)]
        assert keys
        for number in keys:
            above = number - 1
            while above in keys:  # W0, W1, W2 share one comment
                above -= 1
            assert above in commented, lines[number - 1]
