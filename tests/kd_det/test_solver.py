"""SOLVER: which optimizer, over which groups, and what is refused."""

import pytest
import torch

from kd_core.utils.errors import UserError
from kd_det.checks import check_synchronised_norms
from kd_det.solver import build_optimizer, check_solver, scale_to_world_size

DEEPKD = ("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd")


@pytest.mark.parametrize(
    ("name", "momenta"),
    [
        ("deepkd_sgd", {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}),
        ("dot_sgd", {"tog": 0.825, "tcg": 0.975, "ncg": 0.975}),
        ("stream_adamw", {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}),
    ],
)
def test_each_optimizer_has_the_papers_momenta_and_merged_groups(tiny_cfg, tiny_model, name, momenta):
    model = tiny_model()
    cfg = tiny_cfg(*DEEPKD, "SOLVER.OPTIMIZER", name, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BASE_LR", 0.1)
    optimizer = build_optimizer(cfg, model)
    names = {p: n for n, p in model.named_parameters()}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    options = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert len(options) == len(set(options)) <= 4  # weights and biases, of norms and of the others
    for group in optimizer.param_groups:
        assert group["momenta"] == pytest.approx(momenta)
        for p in group["params"]:
            assert group["lr"] == (0.2 if names[p].endswith("bias") else 0.1)
            if names[p].endswith("weight"):  # the decay of biases is a key of its own, whose default has changed
                assert group["weight_decay"] == (0.0 if ".norm." in names[p] else 0.0001)


@pytest.mark.parametrize(
    ("words", "momenta"),
    [
        (("paper",), {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}),
        (("released",), {"tog": 0.825, "tcg": 0.825, "ncg": 0.975}),
        (("released", "SOLVER.DEEPKD.DELTA_TCG", -0.1), {"tog": 0.8, "tcg": 0.8, "ncg": 0.975}),
        (("released", "SOLVER.DEEPKD.DELTA_TOG", 0.05), {"tog": 0.825, "tcg": 0.825, "ncg": 0.975}),
    ],
)
def test_the_released_preset_gives_the_task_the_momentum_of_tcg(tiny_cfg, tiny_model, words, momenta):
    optimizer = build_optimizer(tiny_cfg(*DEEPKD, "SOLVER.DEEPKD.PRESET", *words), tiny_model())
    for group in optimizer.param_groups:
        assert group["momenta"] == pytest.approx(momenta) and group["step"] == "paper"


def test_sgd_is_detectron2s_own(tiny_cfg, tiny_model):
    assert type(build_optimizer(tiny_cfg(), tiny_model())) is torch.optim.SGD


def test_the_matched_step_reaches_the_optimizer(tiny_cfg, tiny_model):
    optimizer = build_optimizer(tiny_cfg(*DEEPKD, "SOLVER.STEP", "matched", "SOLVER.MOMENTUM", 0.8), tiny_model())
    assert {(g["step"], g["base_momentum"]) for g in optimizer.param_groups} == {("matched", 0.8)}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("SOLVER.OPTIMIZER", "adam"), "SOLVER.OPTIMIZER is 'adam', expected one of sgd, dot_sgd, deepkd_sgd"),
        (("SOLVER.STEP", "small"), "SOLVER.STEP is 'small', expected paper or matched"),
        (("SOLVER.DEEPKD.PRESET", "ours"), "SOLVER.DEEPKD.PRESET is 'ours', expected paper or released"),
        (("SOLVER.DEEPKD.PRESET", "released", "SOLVER.STEP", "matched"), "PRESET released means .* set SOLVER.STEP"),
        (("SOLVER.AMP.DTYPE", "float8"), "SOLVER.AMP.DTYPE is 'float8', expected float16 or bfloat16"),
        (("SOLVER.ACCUMULATE_STEPS", 3), "SOLVER.IMS_PER_BATCH 16 must be a positive multiple of the 2 processes × "),
        (("KD.LOSS.NAME", "none"), "SOLVER.OPTIMIZER deepkd_sgd gives distillation a momentum of its own, but"),
        (("SOLVER.OPTIMIZER", "sgd", "SOLVER.MOMENTA", "auto"), "SOLVER.MOMENTA auto compares the gradient streams"),
        (("SOLVER.CLIP_GRADIENTS.ENABLED", True), "CLIP_TYPE 'value' acts on single elements"),
        (("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "global"), "CLIP_TYPE is 'global', expected one of value, norm"),
        (("SOLVER.CHECKPOINT_PERIOD", 0), "SOLVER.CHECKPOINT_PERIOD is 0, expected a whole number ≥ 1"),
    ],
)  # fmt: skip
def test_what_no_run_could_mean_is_refused_with_its_key(tiny_cfg, overrides, message):
    with pytest.raises(UserError, match=message):
        check_solver(tiny_cfg(*DEEPKD, *overrides), world_size=2)


def test_a_momentum_out_of_range_names_its_keys(tiny_cfg, tiny_model):
    with pytest.raises(UserError, match=r"SOLVER.OPTIMIZER deepkd_sgd, MOMENTUM 0.95, DEEPKD .*'tog' is 1.02"):
        build_optimizer(tiny_cfg(*DEEPKD, "SOLVER.MOMENTUM", 0.95), tiny_model())


SCHEDULE = (
    "SOLVER.REFERENCE_WORLD_SIZE", 2, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.BASE_LR", 0.01,
    "SOLVER.MAX_ITER", 1000, "SOLVER.STEPS", "(800,)", "SOLVER.WARMUP_ITERS", 100, "SOLVER.CHECKPOINT_PERIOD", 200,
    "TEST.EVAL_PERIOD", 400, "KD.LOSS.WARMUP_ITERS", 500, "SOLVER.GSNR.PERIOD", 10, "SOLVER.GSNR.WINDOW", 60,
    "SOLVER.EMA.DECAY", 0.99,
)  # fmt: skip


def test_a_schedule_written_for_two_processes_is_scaled_to_eight_and_to_one(tiny_cfg):
    cfg = tiny_cfg(*DEEPKD, *SCHEDULE)
    cfg.freeze()
    more, fewer = scale_to_world_size(cfg, 8), scale_to_world_size(cfg, 1)
    assert more.is_frozen()
    solver = more.SOLVER
    assert (solver.IMS_PER_BATCH, solver.ACCUMULATE_STEPS, solver.BASE_LR) == (32, 2, 0.04)
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (250, (200,), 25)
    assert (solver.CHECKPOINT_PERIOD, more.TEST.EVAL_PERIOD, more.KD.LOSS.WARMUP_ITERS) == (50, 100, 125)
    assert (solver.GSNR.PERIOD, solver.GSNR.WINDOW) == (2, 15)
    assert abs(solver.EMA.DECAY - 0.99**4) < 1e-12  # a step of it sees four times the images
    check_solver(more, world_size=8)
    assert (fewer.SOLVER.IMS_PER_BATCH, fewer.SOLVER.MAX_ITER, fewer.KD.LOSS.WARMUP_ITERS) == (4, 2000, 1000)
    assert abs(fewer.SOLVER.EMA.DECAY - 0.99**0.5) < 1e-12


def test_nothing_is_scaled_without_a_reference_or_at_it_and_one_that_does_not_fit_is_refused(tiny_cfg):
    cfg = tiny_cfg(*DEEPKD, *SCHEDULE)
    assert scale_to_world_size(cfg, 2) is cfg
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    assert scale_to_world_size(cfg, 8) is cfg
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 3
    with pytest.raises(UserError, match=r"SOLVER.REFERENCE_WORLD_SIZE is 3: it must divide SOLVER.IMS_PER_BATCH 8"):
        scale_to_world_size(cfg, 4)


def test_synchronised_norms_that_need_gpus_are_refused_on_cpu_processes(tiny_cfg):
    cfg = tiny_cfg("MODEL.FPN.NORM", "SyncBN")
    with pytest.raises(UserError, match=r"MODEL.FPN.NORM SyncBN .* in 2 processes on the CPU: set .* naiveSyncBN"):
        check_synchronised_norms(cfg, world_size=2)
    check_synchronised_norms(cfg, world_size=1)  # torch's is a BatchNorm there
    with pytest.raises(UserError, match=r"set MODEL.TIMM.NORM BN$"):  # all that set_norm takes
        check_synchronised_norms(tiny_cfg("MODEL.TIMM.NORM", "SyncBN"), world_size=2)
    check_synchronised_norms(tiny_cfg("MODEL.FPN.NORM", "naiveSyncBN"), world_size=2)
