"""A tiny detector of the built-in digits in a folder as training leaves it, and the way to the tools."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from kd_core.utils.files import write_text
from kd_det.checkpoint.checkpointer import WholeCheckpointer
from kd_det.config import kd_defaults, merge_file, merge_list
from kd_det.config.student import student_config

TOOLS = Path(__file__).resolve().parents[2] / "tools"
TINY = Path(__file__).with_name("tiny.yaml")


@pytest.fixture(scope="session")
def load_tool() -> Callable[[str], ModuleType]:
    """`load_tool("dry_run")`: tools/dry_run.py as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_cfg(tmp_path: Path) -> Callable[..., CfgNode]:
    """`tiny_cfg("KEY", value, …)`: the config of a tiny detector; its OUTPUT_DIR is `tmp_path`/run."""

    def build(*overrides: object) -> CfgNode:
        cfg = kd_defaults()
        merge_file(cfg, str(TINY))
        merge_list(cfg, [str(word) for word in ("OUTPUT_DIR", tmp_path / "run", *overrides)])
        return cfg

    return build


@torch.no_grad()
def spread_scores(model: torch.nn.Module) -> None:
    """Norms that fit noise, and a classifier that says one thing or another: random layers say one thing of all."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.backbone(torch.randn(2, 3, 128, 128) * 60)
    model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.5)


@pytest.fixture
def save_run() -> Callable[..., Path]:
    """`save_run(cfg, seed=0)`: an OUTPUT_DIR with the checkpoint and the configs of a training of no iterations."""

    def save(cfg: CfgNode, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model, output = build_model(cfg), Path(cfg.OUTPUT_DIR)
        spread_scores(model)
        output.mkdir(parents=True)
        WholeCheckpointer(model, str(output)).save("model_final", iteration=cfg.SOLVER.MAX_ITER - 1)
        write_text(output / "student.yaml", student_config(cfg).dump())
        write_text(output / "config.yaml", cfg.dump())
        return output

    return save
