"""Every classification config in configs/: reads, builds what needs no download, and says the papers' numbers."""

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from fvcore.common.config import CfgNode

from kd_cls.build import build_distillation_loss, serialization_layer
from kd_cls.checks import check_config
from kd_cls.config import load_cfg
from kd_cls.data import AUGMENTATIONS, DATASETS
from kd_cls.data.build import augmentation
from kd_cls.distributed import Process
from kd_cls.engine.solver import build_optimizer, build_scheduler
from kd_cls.models.factory import create_network
from kd_cls.task.student import Student
from kd_cls.task.teacher import teacher_description
from kd_core.losses.feature_config import distils
from kd_core.optim.config import build_stream_optimizer

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("CIFAR100", "ImageNet", "TinyImageNet", "CUB200")
CONFIGS = [path for folder in FOLDERS for path in sorted((ROOT / "configs" / folder).glob("[!B]*.yaml"))]
CONFIGS += sorted((ROOT / "configs" / "Digits").glob("cls_*.yaml"))
CLASSES = {"digits": 10, "cifar100": 100, "imagenet": 1000, "tiny_imagenet": 200, "cub200": 200}

# Teacher, student: DKD's β; GDKD's w1, w2 (arXiv 2203.08679 and 2512.04625, released code).
PAIRS = {
    ("resnet56", "resnet20"): (2, 1, 1),
    ("resnet110", "resnet32"): (2, 1, 1),
    ("resnet32x4", "resnet8x4"): (8, 2, 8),
    ("wrn_40_2", "wrn_16_2"): (6, 2, 6),
    ("wrn_40_2", "wrn_40_1"): (6, 2, 6),
    ("vgg13", "vgg8"): (6, 1, 6),
    ("resnet32x4", "shufflev1"): (8, 1, 8),
    ("wrn_40_2", "shufflev1"): (8, 2, 6),
    ("vgg13", "mobilenetv2"): (6, 1, 6),
    ("resnet50", "mobilenetv2"): (8, 1, 8),
    ("resnet32x4", "shufflev2"): (8, 1, 8),
}


# Teacher, student: Δ of TCKD, Δ of NCKD, β (DeepKD's released configs over DKD).
RELEASED = {
    ("resnet32x4", "resnet8x4"): (-0.075, 0.05, 8),
    ("resnet56", "resnet20"): (-0.075, 0.075, 0.5),
    ("resnet110", "resnet32"): (-0.075, 0, 3),
    ("vgg13", "vgg8"): (-0.075, 0.025, 6),
    ("vgg13", "mobilenetv2"): (-0.075, 0.08, 1),
    ("resnet50", "mobilenetv2"): (-0.1, 0.025, 2),
    ("resnet32x4", "shufflev1"): (-0.075, 0.085, 8),
    ("resnet32x4", "shufflev2"): (-0.075, 0.075, 8),
    ("wrn_40_2", "shufflev1"): (-0.075, 0.085, 8),
    ("wrn_40_2", "wrn_16_2"): (-0.1, 0.05, 8),
    ("wrn_40_2", "wrn_40_1"): (-0.1, 0.05, 4),
}
# Likewise over KD: Δ of TCKD, Δ of NCKD, weight of the cross-entropy.
RELEASED_OVER_KD = {
    ("resnet32x4", "resnet8x4"): (-0.075, 0.075, 0.5),
    ("resnet56", "resnet20"): (-0.075, 0.025, 0.1),
    ("resnet110", "resnet32"): (-0.1, 0.05, 0.1),
    ("vgg13", "vgg8"): (-0.075, 0.05, 0.1),
    ("vgg13", "mobilenetv2"): (-0.075, 0.095, 0.8),
    ("resnet50", "mobilenetv2"): (-0.1, 0.025, 0.1),
    ("resnet32x4", "shufflev1"): (-0.075, 0.075, 0.1),
    ("resnet32x4", "shufflev2"): (-0.075, 0.075, 0.1),
    ("wrn_40_2", "shufflev1"): (-0.075, 0.085, 0.1),
    ("wrn_40_2", "wrn_16_2"): (-0.075, 0.085, 0.6),
    ("wrn_40_2", "wrn_40_1"): (-0.1, 0.05, 0.1),
}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in configs start at the folder that one works in."""
    monkeypatch.chdir(ROOT)


@cache
def network(name: str, num_classes: int) -> torch.nn.Module:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return create_network(name, num_classes, "", False, "MODEL")


@pytest.mark.parametrize("path", CONFIGS, ids=[f"{path.parent.name}/{path.stem}" for path in CONFIGS])
def test_a_config_says_its_command_and_builds(path: Path, process: Process) -> None:
    relative = path.relative_to(ROOT)
    text = path.read_text()
    assert f"--config-file {relative}\n" in text and "--config-file" in text.split("_BASE_")[0]
    cfg = load_cfg(str(relative))
    assert cfg.OUTPUT_DIR.split("/")[-1] == path.stem and cfg.OUTPUT_DIR.startswith("output/")
    check_config(cfg, process)
    assert not (cfg.MODEL.CHANNELS_LAST or cfg.KD.TEACHER.CHANNELS_LAST or cfg.SOLVER.CUDA_GRAPH), "opt-in on a GPU"
    assert cfg.DATA.NAME in DATASETS and augmentation(cfg) in AUGMENTATIONS
    classes = CLASSES[cfg.DATA.NAME]
    loss = build_distillation_loss(cfg, classes)
    student = Student(network(cfg.MODEL.NAME, classes), serialization_layer(cfg, classes))
    scheduler = build_scheduler(cfg, build_optimizer(cfg, student), steps_per_epoch=10)
    schedule = cfg.SOLVER.SCHEDULE
    first = schedule.WARMUP_LR if schedule.WARMUP_EPOCHS else cfg.SOLVER.BASE_LR
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(first)
    if cfg.SOLVER.OPTIMIZER != "sgd":
        assert re.search(r"Learning rate: (that of DeepKD's released configs|DOT's|ours)", text), "say whose it is"
    assert (loss is None) == (cfg.KD.LOSS.NAME == "none")
    if not distils(cfg.KD):
        assert path.stem.replace("cls_", "").startswith(("teacher", "baseline"))
        return
    name, _, weights, own = teacher_description(cfg)
    assert network(name, classes).num_classes == classes
    if own is not None:
        assert own.DATA.NAME == cfg.DATA.NAME and weights.startswith(own.OUTPUT_DIR)


def test_no_two_configs_write_into_one_folder() -> None:
    folders = [load_cfg(str(path)).OUTPUT_DIR for path in CONFIGS]
    assert len(set(folders)) == len(folders) > 100


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_of_the_papers_has_its_five_configs_with_their_numbers(teacher: str, student: str) -> None:
    beta, w1, w2 = PAIRS[teacher, student]
    for method in ("kd", "dkd", "gdkd", "deepkd", "deepkd_kd"):
        cfg = load_cfg(f"configs/CIFAR100/{method}_{teacher}_{student}.yaml")
        assert f"cifar_{student}" == cfg.MODEL.NAME and cfg.KD.TEACHER.CONFIG_FILE.endswith(f"/teacher_{teacher}.yaml")
        solver, loss = cfg.SOLVER, cfg.KD.LOSS
        light = student in ("mobilenetv2", "shufflev1", "shufflev2")
        assert (0.01 if light else 0.05, 240, 64) == (solver.BASE_LR, solver.EPOCHS, solver.IMS_PER_BATCH)
        assert solver.SCHEDULE.MILESTONES == [150, 180, 210] and solver.WEIGHT_DECAY == 5e-4 and loss.TEMPERATURE == 4
        deep = method.startswith("deepkd")
        assert ("deepkd_sgd" if deep else "sgd") == solver.OPTIMIZER and deep == loss.TOPK.ENABLED
        if method == "kd":
            assert (cfg.KD.TASK_WEIGHT, loss.WEIGHT) == (0.1, 0.9)
        if method in ("dkd", "gdkd"):
            assert (cfg.KD.TASK_WEIGHT, loss.WEIGHT, loss.WARMUP_EPOCHS) == (1, 1, 20)
        if method == "dkd":
            assert (1, beta) == (loss.DKD.ALPHA, loss.DKD.BETA)
        if method == "gdkd":
            assert (1, w1, w2, 5) == (loss.GDKD.W0, loss.GDKD.W1, loss.GDKD.W2, loss.GDKD.K)


def momenta(cfg: CfgNode) -> dict[str, float]:
    return build_stream_optimizer(cfg.SOLVER, [{"params": [torch.zeros(1)]}]).param_groups[0]["momenta"]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_has_deepkd_as_released_with_its_numbers(teacher: str, student: str) -> None:
    tcg, ncg, beta = RELEASED[teacher, student]
    light, long = student in ("mobilenetv2", "shufflev1", "shufflev2"), student == "wrn_16_2"
    cfg = load_cfg(f"configs/CIFAR100/deepkd_released_{teacher}_{student}.yaml")
    solver, loss = cfg.SOLVER, cfg.KD.LOSS
    assert f"cifar_{student}" == cfg.MODEL.NAME and cfg.KD.TEACHER.CONFIG_FILE.endswith(f"/teacher_{teacher}.yaml")
    assert (0.04 if long else 0.01 if light else 0.05, 480 if long else 240) == (solver.BASE_LR, solver.EPOCHS)
    assert ([180, 300, 420] if long else [150, 180, 210]) == solver.SCHEDULE.MILESTONES and solver.STEP == "paper"
    assert ("dkd", 1, beta, 4, 20) == (loss.NAME, loss.DKD.ALPHA, loss.DKD.BETA, loss.TEMPERATURE, loss.WARMUP_EPOCHS)
    assert not loss.TOPK.ENABLED
    assert momenta(cfg) == pytest.approx({"tog": 0.9 + tcg, "tcg": 0.9 + tcg, "ncg": 0.9 + ncg})
    over_kd = load_cfg(f"configs/CIFAR100/deepkd_released_kd_{teacher}_{student}.yaml")
    assert (over_kd.KD.LOSS.NAME, over_kd.KD.LOSS.WEIGHT, over_kd.KD.LOSS.TOPK.ENABLED) == ("kd", 1, False)
    tcg, ncg, task_weight = RELEASED_OVER_KD[teacher, student]
    assert task_weight == over_kd.KD.TASK_WEIGHT
    assert momenta(over_kd) == pytest.approx({"tog": 0.9 + tcg, "tcg": 0.9 + tcg, "ncg": 0.9 + ncg})


@pytest.mark.parametrize(("pair", "beta", "ncg"), [("resnet34_resnet18", 1, 0.05), ("resnet50_mobilenetv1", 2, 0.075)])
def test_imagenet_has_deepkd_as_released_with_its_schedule(pair: str, beta: float, ncg: float) -> None:
    cfg = load_cfg(f"configs/ImageNet/deepkd_released_{pair}.yaml")
    assert (beta, 1, False) == (cfg.KD.LOSS.DKD.BETA, cfg.KD.LOSS.TEMPERATURE, cfg.KD.LOSS.TOPK.ENABLED)
    assert momenta(cfg) == pytest.approx({"tog": 0.825, "tcg": 0.825, "ncg": 0.9 + ncg})
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=cfg.SOLVER.BASE_LR)
    scheduler = build_scheduler(cfg, optimizer, steps_per_epoch=10)
    rates = {}
    for epoch in (0, 10, 20, 60, 100):
        scheduler.step_update(10 * epoch)
        rates[epoch] = optimizer.param_groups[0]["lr"]
    assert rates == pytest.approx({0: 0.02, 10: 0.11, 20: 0.2, 60: (0.2 + 5e-5) / 2, 100: 5e-5})


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_has_its_configs_of_two_views_with_the_released_numbers(teacher: str, student: str) -> None:
    light = student in ("mobilenetv2", "shufflev1", "shufflev2")
    for method in ("mlkd", "crld", "deepkd_mlkd", "deepkd_crld"):
        cfg = load_cfg(f"configs/CIFAR100/{method}_{teacher}_{student}.yaml")
        assert f"cifar_{student}" == cfg.MODEL.NAME and cfg.KD.TEACHER.CONFIG_FILE.endswith(f"/teacher_{teacher}.yaml")
        solver, loss = cfg.SOLVER, cfg.KD.LOSS
        assert (2, method.split("_")[-1], 64) == (cfg.DATA.VIEWS, loss.NAME, solver.IMS_PER_BATCH)
        deep = method.startswith("deepkd")
        assert ("deepkd_sgd" if deep else "sgd") == solver.OPTIMIZER
        assert deep == loss.TOPK.ENABLED == loss.TWO_VIEW.DECOUPLED
        if loss.NAME == "mlkd":
            assert (solver.EPOCHS, solver.SCHEDULE.MILESTONES) == (480, [300, 360, 420])
            assert loss.MLKD.TEMPERATURES == [4, 3, 5, 2, 6]
        else:
            assert (240, 0.01 if light else 0.05) == (solver.EPOCHS, solver.BASE_LR)
            assert (loss.TEMPERATURE, loss.CRLD.WITHIN_THRESHOLD, loss.CRLD.CROSS_THRESHOLD) == (4, 0.9, 0.2)
        if method == "mlkd":
            assert (0.01 if light else 0.025, 0.5, 0.5) == (solver.BASE_LR, cfg.KD.TASK_WEIGHT, loss.MLKD.WEIGHT)
        if method == "crld":
            assert (cfg.KD.TASK_WEIGHT, loss.CRLD.WITHIN_WEIGHT, loss.CRLD.CROSS_WEIGHT) == (1, 2, 0.5)


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_every_pair_has_its_configs_of_feature_maps(teacher: str, student: str) -> None:
    for method in ("reviewkd", "reviewdkd"):
        cfg = load_cfg(f"configs/CIFAR100/{method}_{teacher}_{student}.yaml")
        assert f"cifar_{student}" == cfg.MODEL.NAME and cfg.KD.TEACHER.CONFIG_FILE.endswith(f"/teacher_{teacher}.yaml")
        feature, released = cfg.KD.FEATURE, (teacher, student) == ("resnet32x4", "resnet8x4")
        assert ("review", 5 if released else 1) == (feature.NAME, feature.WEIGHT)
        assert (feature.WARMUP_EPOCHS, feature.PREACT) == (20, "teacher")
        if method == "reviewkd":
            assert cfg.KD.LOSS.NAME == "none"
        else:
            assert ("dkd", PAIRS[teacher, student][0]) == (cfg.KD.LOSS.NAME, cfg.KD.LOSS.DKD.BETA)


@pytest.mark.parametrize(("pair", "weight", "rate"), [("resnet34_resnet18", 1, 0.1), ("resnet50_mobilenetv1", 8, 0.2)])
def test_imagenet_has_the_released_numbers_of_two_views_and_of_feature_maps(
    pair: str, weight: float, rate: float
) -> None:
    for method in ("reviewkd", "reviewdkd"):
        cfg = load_cfg(f"configs/ImageNet/{method}_{pair}.yaml")
        assert (weight, 1, "both") == (cfg.KD.FEATURE.WEIGHT, cfg.KD.FEATURE.WARMUP_EPOCHS, cfg.KD.FEATURE.PREACT)
        assert (method == "reviewdkd") == (cfg.KD.LOSS.NAME == "dkd")
    for method in ("mlkd", "crld", "deepkd_mlkd", "deepkd_crld"):
        cfg = load_cfg(f"configs/ImageNet/{method}_{pair}.yaml")
        loss, over_mlkd = cfg.KD.LOSS, method.endswith("mlkd")
        assert (2, method.split("_")[-1]) == (cfg.DATA.VIEWS, loss.NAME)
        assert (rate if over_mlkd else 0.2, 0.5 if over_mlkd else 2) == (cfg.SOLVER.BASE_LR, cfg.KD.TASK_WEIGHT)
        assert loss.TEMPERATURE == 1 or (over_mlkd and loss.MLKD.TEMPERATURES[0] == 1)
        deep = method.startswith("deepkd")
        assert deep == loss.TWO_VIEW.DECOUPLED == loss.TOPK.ENABLED and (not deep or loss.TWO_VIEW.BETA == 0.5)


@pytest.mark.parametrize(("student", "beta", "w"), [("resnet34_resnet18", 0.5, 1), ("resnet50_mobilenetv1", 2, 2)])
def test_imagenet_has_the_papers_numbers(student: str, beta: float, w: float) -> None:
    for method in ("kd", "dkd", "gdkd", "deepkd", "deepkd_kd", "aekt", "dot"):
        cfg = load_cfg(f"configs/ImageNet/{method}_{student}.yaml")
        assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.EPOCHS, cfg.SOLVER.IMS_PER_BATCH) == (0.2, 100, 512)
        assert cfg.SOLVER.WEIGHT_DECAY == 1e-4 and cfg.KD.LOSS.TEMPERATURE == 1
        assert method != "dkd" or (beta, 1) == (cfg.KD.LOSS.DKD.BETA, cfg.KD.LOSS.WARMUP_EPOCHS)
        gdkd = cfg.KD.LOSS.GDKD
        assert method != "gdkd" or (0.5, w, w, 5) == (gdkd.W0, gdkd.W1, gdkd.W2, gdkd.K)
    for folder in ("TinyImageNet", "CUB200"):
        gdkd = load_cfg(f"configs/{folder}/gdkd_{student}.yaml").KD.LOSS.GDKD
        assert (0.5, w, w, 5) == (gdkd.W0, gdkd.W1, gdkd.W2, gdkd.K)


def test_no_config_sets_a_key_of_another_loss() -> None:
    groups = {"dkd": "DKD", "gdkd": "GDKD", "gdkd3": "GDKD3", "aekt": "AEKT", "mlkd": "MLKD", "crld": "CRLD"}
    for path in CONFIGS:
        own = groups.get(load_cfg(str(path)).KD.LOSS.NAME)
        for group in set(groups.values()) - {own}:
            assert not re.search(rf"^    {group}:", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize("folder", ["CIFAR100", "ImageNet"])
def test_deepkds_configs_keep_the_step_size_but_for_the_released_ones(folder: str) -> None:
    """Under the paper's steps, at these rates, a ResNet-8x4 was far behind plain training (docs/results.md)."""
    steps = {path.stem: load_cfg(str(path)).SOLVER.STEP for path in CONFIGS if path.parent.name == folder}
    ours = {name for name in steps if name.startswith("deepkd_") and not name.startswith("deepkd_released_")}
    assert ours and {name for name, step in steps.items() if step == "matched"} == ours
