"""The detection configs train, save and resume, one of each kind; every key in every one of them is read, and every key
of ours explained.
"""

import ast
import inspect
import re
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

import kd_core.losses.config as loss_config
import kd_core.losses.feature_config as feature_config
import kd_det.config.defaults as det_config
from helpers import config_walk
from kd_core.losses.feature_config import distils
from kd_core.optim.config import build_stream_optimizer
from kd_core.utils.errors import UserError
from kd_det.checks import check_backbone, check_frozen_stem, check_meta_architecture, check_unread
from kd_det.compat import add_deeplab_config
from kd_det.config import kd_defaults, lookup, merge_file
from kd_det.solver import check_solver

ROOT = Path(__file__).resolve().parents[2]
COCO = sorted((ROOT / "configs/COCO").glob("[!B]*.yaml"))
DIGITS = sorted(p for p in (ROOT / "configs/Digits").glob("[!B]*.yaml") if not p.name.startswith("cls_"))
CAMVID = sorted((ROOT / "configs/CamVid").glob("[!B]*.yaml"))
CITYSCAPES = sorted((ROOT / "configs/Cityscapes").glob("[!B]*.yaml"))
VOC = sorted((ROOT / "configs/VOC").glob("*.yaml"))
# Upstream's builds have it, and tools/install_detectron2.py installs it.
EVERY = [*COCO, *DIGITS, *CAMVID, *CITYSCAPES]
DETECTION_BASES = [path for path in (ROOT / "configs/Digits").glob("Base-*.yaml") if "cls" not in path.stem]
BASES = [*sorted((ROOT / "configs/COCO").glob("Base*.yaml")), *sorted(DETECTION_BASES)]
BASES += [ROOT / "configs/CamVid/Base-CamVid.yaml"]


def read(path: Path) -> CfgNode:
    cfg = kd_defaults()
    merge_file(cfg, str(path))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize("path", [*EVERY, *VOC], ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_names_a_loss_and_an_optimizer_that_can_be_built(path):
    cfg = read(path)
    for check in (check_solver, check_meta_architecture, check_backbone, check_frozen_stem, check_unread):
        check(cfg)
    architecture = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    loss = architecture.build_loss(cfg)
    method = re.sub("^(retinanet|seg|panoptic|bccd)_", "", path.stem).split("_")[0]
    assert (loss is None) == (method in ("baseline", "teacher", "reviewkd"))
    assert (cfg.KD.FEATURE.NAME == "review") == ("review" in path.stem)
    if loss is not None:
        classes = lookup(cfg, architecture.class_keys[0]) + architecture.background
        terms = loss(torch.randn(6, classes), torch.randn(6, classes), torch.randint(classes, (6,)), 0.5)
        assert set(terms) == set(loss.streams) and all(value.isfinite() for value in terms.values())
        assert method in (cfg.KD.LOSS.NAME, f"review{cfg.KD.LOSS.NAME}", "dot", "deepkd")
    if cfg.SOLVER.OPTIMIZER != "sgd":
        assert "Learning rate: " in path.read_text(), "say whose learning rate it is"
        build_stream_optimizer(cfg.SOLVER, [{"params": [nn.Parameter(torch.zeros(1))]}])
    assert f"--config-file {path.relative_to(ROOT)}" in path.read_text(), "say how it is run"
    bccd = path.stem.startswith("bccd_")
    folder = path.stem.replace("_", "/", 1) if bccd else f"{path.parent.name.lower()}/{path.stem}"
    assert f"output/{folder}" == cfg.OUTPUT_DIR


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> Callable[[Path], set[str]]:
    """Walks a config, once, and tells which keys were read on the way."""
    folder = tmp_path_factory.mktemp("walk")
    entries = {classes: config_walk.make_data(folder, classes) for classes in (10, 80)}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the teacher's config is named from there
        yield cache(lambda path: config_walk.walk(path, folder, entries[80 if path in COCO else 10], path in resumed()))


def bases_of(path: Path) -> list[Path]:
    """Every file that `path` includes, directly or not."""
    name = yaml.safe_load(path.read_text()).get("_BASE_")
    return [] if name is None else [path.parent / name, *bases_of(path.parent / name)]


@cache
def parts_of(path: Path) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """What decides which keys a training reads: its model, and its method of distillation."""
    try:
        cfg = read(path)
    except UserError:  # which the tests of this config tell
        return (path,), (path,)
    architecture = cfg.MODEL.META_ARCHITECTURE
    model = (cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.MASK_ON, distils(cfg.KD))
    method = (cfg.KD.LOSS.NAME, cfg.KD.FEATURE.NAME, cfg.SOLVER.OPTIMIZER)
    return ("model", architecture, *model), ("method", architecture, *method)


@cache
def trained() -> list[Path]:
    """Configs that together have every model, every method and every base; the small ones before those of COCO."""
    seen, chosen = set(), []
    for path in (*DIGITS, *CAMVID, *CITYSCAPES, *COCO):
        new = {*parts_of(path), *(base for base in bases_of(path) if base in BASES)} - seen
        if new:
            chosen.append(path)
            seen |= new
    return chosen


@cache
def resumed() -> list[Path]:
    """Of these one for each set of states that a checkpoint holds."""
    kinds = {}
    for path in trained():
        (_, architecture, _, *model), (*_, loss, feature, optimizer) = parts_of(path)
        kinds.setdefault((architecture, *model, loss == "aekt", feature, optimizer), path)
    return list(kinds.values())


@pytest.mark.parametrize("path", trained(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_steps_and_saves_and_one_of_each_kind_resumes_and_is_evaluated(path, walked):
    reads = walked(path)
    unread = [key for key in keys_in(path) if key not in reads]
    assert unread == [], f"{path.relative_to(ROOT)} sets keys that nothing reads"


OTHERS = [path for path in EVERY if path not in trained()]


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_key_of_another_config_is_read_where_its_model_or_its_method_is_trained(path, walked):
    model, method = parts_of(path)

    def read(key: str) -> bool:
        part = method if key.startswith(("KD.", "SOLVER.")) else model
        return any(key in walked(other) for other in trained() if part in parts_of(other))

    unread = [key for key in keys_in(path) if not read(key)]
    assert unread == [], f"{path.relative_to(ROOT)} sets keys that nothing reads"


@pytest.mark.parametrize("base", BASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_key_in_a_base_config_is_read_by_one_that_includes_it(base, walked):
    # Whichever test comes first has walked them.
    reads = set().union(*(walked(path) for path in trained() if base in bases_of(path)))
    assert [key for key in keys_in(base) if key not in reads] == []


def test_a_key_that_nothing_reads_is_found(tmp_path, walked):
    path = tmp_path / "Unread" / "kd.yaml"
    path.parent.mkdir()
    text = (
        (ROOT / "configs/Digits/kd.yaml")
        .read_text()
        .replace("baseline.yaml", str(ROOT / "configs/Digits/baseline.yaml"))
    )
    path.write_text(text + "MODEL:\n  SEM_SEG_HEAD:\n    CONVS_DIM: 64\n")
    reads = walked(path)
    assert [key for key in keys_in(path) if key not in reads] == ["MODEL.SEM_SEG_HEAD.CONVS_DIM"]


def keys_in(path: Path) -> list[str]:
    """Dotted keys that a yaml file sets itself, without those of its `_BASE_`."""
    own = yaml.safe_load(path.read_text())
    return [key for key in leaves(CfgNode(own), None) if key not in ("_BASE_", "VERSION")]


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
    plain = get_cfg()
    add_deeplab_config(plain)
    ours = leaves(kd_defaults(), plain)
    assert "KD.TEACHER.EVALUATE" in ours and "SOLVER.DEEPKD.DELTA_TCG" in ours and "SOLVER.AMP.DTYPE" in ours
    read_somewhere = names_read()
    unread = {key for key in ours if key.split(".")[-1] not in read_somewhere}
    assert unread == set()


def test_every_key_of_ours_has_a_comment_above_it():
    bare = []
    modules = (det_config, loss_config, feature_config)
    adders = [f for module in modules for name, f in vars(module).items() if name.startswith("add_")]
    for adder in adders:
        for above, line in pairwise(inspect.getsource(adder).splitlines()):
            key = re.match(r"    (?:cfg|node)\.([A-Z0-9_.]+) = (.*)", line)
            makes_node = key and re.fullmatch(r"(CfgNode|new)\(\)", key[2])
            if key and not makes_node and not above.strip().startswith("#"):
                bare.append(key[1])
    # One comment may explain a family of keys.
    assert [key for key in bare if not re.fullmatch(r"GDKD3?\.W[12]|GDKDS\.BACKGROUND", key)] == []


@pytest.mark.parametrize(("pair", "weight"), [("r18_r101", 1.2), ("r50_r101", 1.0), ("mv2_r50", 2.0)])
def test_every_coco_pair_has_the_released_configs_of_feature_maps(pair, weight):
    for method, loss in (("reviewkd", "none"), ("reviewdkd", "dkd"), ("reviewgdkd", "gdkd"), ("reviewgdkds", "gdkds")):
        cfg = read(ROOT / f"configs/COCO/{method}_{pair}.yaml")
        assert ("review", weight, loss) == (cfg.KD.FEATURE.NAME, cfg.KD.FEATURE.WEIGHT, cfg.KD.LOSS.NAME)
        assert (5000 if method == "reviewgdkds" else 0) == cfg.KD.LOSS.WARMUP_ITERS
    masked = read(ROOT / f"configs/COCO/reviewkd_mask_{pair}.yaml")
    assert (True, {1.2: 1.5, 1.0: 0.8, 2.0: 1.0}[weight]) == (masked.MODEL.MASK_ON, masked.KD.FEATURE.WEIGHT)
