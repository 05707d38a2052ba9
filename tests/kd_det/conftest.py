"""Tiny detectors: a real Faster R-CNN with FPN of a few thousand weights, on images of 64 px."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from helpers.tiny_detector import RETINANET, TINY, make_batch
from kd_det.config import kd_defaults, merge_list

ROOT = Path(__file__).resolve().parents[2]

@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """`tiny_cfg("KEY", value, …)`: the config of a tiny student; its teacher, where there is a loss, is one of the
    same kind.
    """

    def build(*overrides: object) -> CfgNode:
        cfg = kd_defaults()
        cfg.merge_from_list([word for pair in TINY.items() for word in pair])
        teacher = tmp_path / "teacher.yaml"
        if not teacher.exists():
            teacher.write_text(cfg.dump())
        cfg.KD.TEACHER.CONFIG_FILE = str(teacher)
        cfg.OUTPUT_DIR = str(tmp_path / "output")
        merge_list(cfg, [str(word) for word in overrides])
        return cfg

    return build


@pytest.fixture
def tiny_model(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., torch.nn.Module]:
    """`tiny_model("KEY", value, …)`: the detector of `tiny_cfg`, built by detectron2 with seed 0."""

    def build(*overrides: object) -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(tiny_cfg(*overrides))

    return build


@pytest.fixture
def retinanet(tiny_cfg: Callable[..., CfgNode]) -> Callable[..., torch.nn.Module]:
    """`retinanet("KEY", value, …)`: a tiny RetinaNet; its teacher, where there is a loss, is one of the same kind."""
    cfg = tiny_cfg(*RETINANET)
    Path(cfg.KD.TEACHER.CONFIG_FILE).write_text(cfg.dump())

    def build(*overrides: object) -> torch.nn.Module:
        torch.manual_seed(0)
        return build_model(tiny_cfg(*RETINANET, *overrides))

    return build


@pytest.fixture
def storage() -> EventStorage:
    """detectron2's event storage, which its detectors write to in training."""
    with EventStorage() as opened:
        yield opened


@pytest.fixture
def batch() -> list[dict]:
    """Two images of three boxes each."""
    return make_batch()
