"""Every detection config here merges, and what it names can be built; every key of ours is read and explained."""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

import kd_core.losses.config as loss_config
import kd_det.config as det_config
from kd_det.config import build_box_loss, kd_defaults, merge_file
from kd_det.solver import build_optimizer, build_stream_optimizer, check_solver
from kd_det.stream_trainer import build_step

ROOT = Path(__file__).resolve().parents[2]
COCO = sorted((ROOT / "configs/COCO").glob("[!B]*.yaml"))
DIGITS = sorted(p for p in (ROOT / "configs/Digits").glob("[!B]*.yaml") if not p.name.startswith("cls_"))


def read(path: Path) -> CfgNode:
    cfg = kd_defaults()
    merge_file(cfg, str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("path", [*COCO, *DIGITS], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_names_a_loss_and_an_optimizer_that_can_be_built(path):
    cfg = read(path)
    check_solver(cfg, world_size=2)
    loss = build_box_loss(cfg)
    assert (loss is None) == (path.stem.startswith("baseline") or path.stem == "teacher")
    if loss is not None:
        classes = cfg.MODEL.ROI_HEADS.NUM_CLASSES + 1
        terms = loss(torch.randn(6, classes), torch.randn(6, classes), torch.randint(classes, (6,)), 0.5)
        assert set(terms) == set(loss.streams) and all(value.isfinite() for value in terms.values())
        assert path.stem.split("_")[0] in (cfg.KD.LOSS.NAME, "dot", "deepkd")
    if cfg.SOLVER.OPTIMIZER != "sgd":
        assert "Learning rate: " in path.read_text(), "say whose learning rate it is"
        build_stream_optimizer(cfg, [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert f"--config-file {path.relative_to(ROOT)}" in path.read_text(), "say how it is run"
    assert Path(cfg.OUTPUT_DIR) == Path("output", path.parent.name.lower(), path.stem)


@pytest.mark.parametrize("path", DIGITS, ids=lambda path: path.stem)
def test_a_digits_config_builds_its_model_and_step(path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the teacher's config is named from there
    cfg = read(path)
    cfg.KD.TEACHER.WEIGHTS, cfg.KD.TEACHER.ALLOW_RANDOM = "", True
    model = build_model(cfg)
    if model.teacher is not None:
        model.load_teacher()
    trainer = build_step(cfg, model, [], build_optimizer(cfg, model))
    trained = {p for p in model.parameters() if p.requires_grad}
    assert {p for group in trainer.optimizer.param_groups for p in group["params"]} == trained


def leaves(node: CfgNode, known: CfgNode | None, prefix: str = "") -> list[str]:
    """Dotted keys of `node` that are not in `known`."""
    found = []
    for key, value in node.items():
        old = known.get(key) if isinstance(known, CfgNode) else None
        if isinstance(value, CfgNode):
            found += leaves(value, old, f"{prefix}{key}.")
        elif not (isinstance(known, CfgNode) and key in known):
            found.append(prefix + key)
    return found


def names_read() -> set[str]:
    """Names of all attributes that the packages read, outside of the functions that add the keys."""
    names = set()
    for path in [*(ROOT / "kd_det").rglob("*.py"), *(ROOT / "kd_core").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        adders = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("add_")]
        inside = {id(child) for adder in adders for child in ast.walk(adder)}
        names |= {
            n.attr
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load) and id(n) not in inside
        }
    return names


def test_every_key_of_ours_is_read_by_something():
    ours = leaves(kd_defaults(), get_cfg())
    assert "KD.TEACHER.EVALUATE" in ours and "SOLVER.DEEPKD.DELTA_TCG" in ours and "SOLVER.AMP.DTYPE" in ours
    read_somewhere = names_read()
    unread = {key for key in ours if key.split(".")[-1] not in read_somewhere}
    assert unread == set()


def test_every_key_of_ours_has_a_comment_above_it():
    bare = []
    adders = [f for module in (det_config, loss_config) for name, f in vars(module).items() if name.startswith("add_")]
    for adder in adders:
        for above, line in pairwise(inspect.getsource(adder).splitlines()):
            key = re.match(r"    (?:cfg|node)\.([A-Z0-9_.]+) = (.*)", line)
            makes_node = key and re.fullmatch(r"(CfgNode|new)\(\)", key[2])
            if key and not makes_node and not above.strip().startswith("#"):
                bare.append(key[1])
    # One comment may stand above the keys of a family.
    assert [key for key in bare if not re.fullmatch(r"GDKD3?\.W[12]|GDKDS\.BACKGROUND", key)] == []
