"""Every method trains: its terms, its streams, and what each option does."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.task import DistillationTeacher, TrainingTask
from torch.nn import functional as F

from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.distributed import Process
from kd_cls.engine.trainer import Trainer
from kd_cls.task.student import Student
from kd_core.losses import SerializationLayer
from kd_core.optim.gsnr import suggest_momenta
from kd_core.utils.compiling import CompiledOrPlain
from kd_core.utils.errors import UserError

METHODS: dict[str, tuple[list, set[str], int]] = {  # options, terms beside the task's, backward passes of a step
    "plain": ([], set(), 1),
    "kd": (["KD.LOSS.NAME", "kd", "KD.LOSS.WEIGHT", 0.9, "KD.TASK_WEIGHT", 0.1], {"tckd", "nckd"}, 1),
    "dkd": (["KD.LOSS.NAME", "dkd", "KD.LOSS.STANDARDIZE", True, "KD.LOSS.WARMUP_EPOCHS", 1], {"tckd", "nckd"}, 1),
    "gdkd": (["KD.LOSS.NAME", "gdkd"], {"mass", "within_top", "within_rest"}, 1),
    "gdkd3": (["KD.LOSS.NAME", "gdkd3"], {"mass", "within_top", "within_rest"}, 1),
    "aekt": (["KD.LOSS.NAME", "aekt"], {"explicit", "implicit"}, 1),
    "dot": (["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "dot_sgd"], {"tckd", "nckd"}, 2),
    "deepkd over kd": (["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "deepkd_sgd"], {"tckd", "nckd"}, 2),
    "deepkd over dkd, masked": (
        ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "KD.LOSS.TOPK.ENABLED", True],
        {"tckd", "nckd"},
        2,
    ),
    "deepkd as released": (
        ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.DEEPKD.PRESET", "released"],
        {"tckd", "nckd"},
        2,
    ),
    "deepkd with three momenta": (
        ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.DEEPKD.DELTA_NCG", 0.05],
        {"tckd", "nckd"},
        3,
    ),
    "stream_adamw": (["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "stream_adamw"], {"tckd", "nckd"}, 2),
    "mlkd": (["KD.LOSS.NAME", "mlkd", "DATA.VIEWS", 2], {"tckd", "nckd", "class", "batch"}, 1),
    "deepkd over crld": (
        [
            *["KD.LOSS.NAME", "crld", "DATA.VIEWS", 2, "KD.LOSS.CRLD.WITHIN_THRESHOLD", 0.0],
            *["SOLVER.OPTIMIZER", "deepkd_sgd", "KD.LOSS.TWO_VIEW.DECOUPLED", True],
        ],
        {"within_tckd", "within_nckd", "cross_tckd", "cross_nckd"},
        2,
    ),
    "reviewkd": (["KD.FEATURE.NAME", "review"], {"review"}, 1),
    "deepkd over dkd and review": (
        ["KD.LOSS.NAME", "dkd", "KD.FEATURE.NAME", "review", "SOLVER.OPTIMIZER", "deepkd_sgd"],
        {"tckd", "nckd", "review"},
        2,
    ),
    "timm's lamb": (["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "lamb"], {"tckd", "nckd"}, 1),
}


def first_batch(trainer: Trainer) -> tuple[Any, ...]:
    """The batch of the first step as `step` takes it."""
    images, target = next(iter(trainer.loaders.train))
    return images, target, 0, trainer.loaders.train.sampler.batch_indices(0, 0)


def test_a_plain_loop_over_timms_task_api_trains_the_task(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("KD.LOSS.NAME", "dkd"), process)
    task, (images, target, *_) = trainer.task.train(), first_batch(trainer)
    assert isinstance(task, TrainingTask) and isinstance(task.teacher, DistillationTeacher)
    optimizer = torch.optim.SGD(task.trainable_module.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(8):
        result = task(images, target)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        losses.append(float(result["loss"].detach()))
    assert result["output"].shape == (16, 10) and losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_batch_falls(method: str, tiny: Callable, process: Process) -> None:
    options, terms, _ = METHODS[method]
    rate = 0.003 if method in ("stream_adamw", "timm's lamb") else 0.02
    once = ["DATA.TRAIN_IMAGES", 16, "DATA.AUGMENTATION", "none", "SOLVER.EPOCHS", 8, "SOLVER.EVAL_PERIOD", 8]
    trainer = build_trainer(tiny(*options, *once, "SOLVER.BASE_LR", rate), process)
    assert set(trainer.task.streams) == {"task"} | terms
    images, target, *_ = first_batch(trainer)
    before = trainer.task.train()(images, target)
    trainer.run()
    after = trainer.task.train()(images, target)
    assert set(after) == {"loss", "output", "task"} | terms
    assert float(after["loss"]) < 0.9 * float(before["loss"])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_takes_one_backward_pass_a_set_of_equal_momenta(method: str, tiny: Callable, process: Process) -> None:
    options, _, passes = METHODS[method]
    trainer = build_trainer(tiny(*options), process)
    trainer.task.train()
    counted = []
    trainer.task.trainable_module.model.fc.weight.register_hook(lambda gradient: counted.append(1))
    trainer.step(*first_batch(trainer))
    assert len(counted) == passes


def test_distillation_acts_before_aekts_layer_and_classification_behind_it(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("KD.LOSS.NAME", "aekt"), process)
    layer = trainer.task.trainable_module.serialization
    images, target, *_ = first_batch(trainer)
    result = trainer.task(images, target)
    gradient = torch.autograd.grad(
        result["explicit"] + result["implicit"], layer.weight, allow_unused=True, retain_graph=True
    )
    assert gradient == (None,)
    assert torch.autograd.grad(result["task"], layer.weight)[0].abs().sum() > 0
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert decays[id(layer.weight)] == 0 and decays[id(trainer.task.trainable_module.model.fc.weight)] == 5e-4


def test_parts_of_a_batch_add_up_to_the_whole(tiny: Callable, process: Process, tmp_path: Path) -> None:
    options = [
        "KD.LOSS.NAME",
        "dkd",
        "SOLVER.OPTIMIZER",
        "deepkd_sgd",
        "MODEL.FREEZE_BN",
        True,
        "DATA.TRAIN_IMAGES",
        39,
    ]
    weights = []
    for parts in (1, 2, 4):
        trainer = build_trainer(
            tiny(*options, "SOLVER.ACCUMULATE_STEPS", parts, "OUTPUT_DIR", tmp_path / str(parts)), process
        )
        trainer.task.double()
        for images, target in trainer.loaders.train:  # 16, 16 and 7 images
            indices = torch.arange(len(images))
            trainer.task.train()
            trainer.step(images.double(), target, 0, indices)
        weights.append(torch.cat([p.detach().flatten() for p in trainer.task.trainable_module.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-12
    assert (weights[0] - weights[2]).abs().max() < 1e-12


def test_frozen_batchnorm_keeps_weights_and_statistics(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("MODEL.FREEZE_BN", True), process)
    before = {name: tensor.clone() for name, tensor in trainer.task.trainable_module.state_dict().items()}
    trainer.run()
    after = trainer.task.trainable_module.state_dict()
    kept = [name for name in before if ".bn" in name]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert not torch.equal(before["model.conv1.weight"], after["model.conv1.weight"])


@pytest.mark.parametrize(
    ("words", "momenta"),
    [
        (("paper",), {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}),
        (("released", "SOLVER.DEEPKD.DELTA_NCG", 0.05), {"tog": 0.825, "tcg": 0.825, "ncg": 0.95}),
    ],
)
def test_the_released_preset_gives_the_task_the_momentum_of_tcg(
    words: tuple, momenta: dict[str, float], tiny: Callable, process: Process
) -> None:
    deepkd = ("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.DEEPKD.PRESET")
    optimizer = build_trainer(tiny(*deepkd, *words), process).optimizer
    for group in optimizer.param_groups:
        assert group["momenta"] == pytest.approx(momenta) and group["step"] == "paper"


def test_norms_and_biases_may_be_kept_from_decay(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("SOLVER.DECAY_NORM_AND_BIAS", False), process)
    for group in trainer.optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert len(trainer.optimizer.param_groups) == 2


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_mixed_precision_follows_full_precision(dtype: str, tiny: Callable, process: Process) -> None:
    options = ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd"]
    results = []
    for amp in ([], ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype]):
        trainer = build_trainer(tiny(*options, *amp), process)
        images, target, *_ = first_batch(trainer)
        trainer.task.train()
        results.append(trainer.task(images, target))
    assert results[1]["output"].dtype == getattr(torch, dtype)
    for term in ("task", "tckd", "nckd"):
        assert results[1][term].dtype == torch.float32
        assert torch.allclose(results[0][term], results[1][term], rtol=0.05)
    assert trainer.scaler.is_enabled() == (dtype == "float16")


def test_an_infinite_gradient_skips_the_step_and_halves_the_scale(tiny: Callable, process: Process) -> None:
    options = ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.AMP.ENABLED", True]
    trainer = build_trainer(tiny(*options), process)
    trainer.task.train()
    weight = trainer.task.trainable_module.model.fc.weight
    handle = weight.register_hook(lambda gradient: gradient * float("inf"))
    before, scale = weight.detach().clone(), trainer.scaler.get_scale()
    trainer.step(*first_batch(trainer))
    assert torch.equal(before, weight) and trainer.scaler.get_scale() == scale / 2
    handle.remove()
    for _ in range(20):  # the scale halves until it fits
        trainer.step(*first_batch(trainer))
        if not torch.equal(before, weight):
            break
    assert weight.isfinite().all() and not torch.equal(before, weight)


def test_label_smoothing_and_mixed_labels_reach_the_task_alone(tiny: Callable, process: Process) -> None:
    options = ["KD.LOSS.NAME", "kd", "KD.LOSS.WEIGHT", 1.0, "KD.LOSS.TEMPERATURE", 1]
    trainer = build_trainer(tiny(*options, "SOLVER.MIXUP.CUTMIX_ALPHA", 1.0, "SOLVER.LABEL_SMOOTHING", 0.1), process)
    images, target, *_ = first_batch(trainer)
    images, soft = trainer.mixup(images, target)
    result = trainer.task.eval()(images, soft)
    logits, teacher_logits = result["output"], trainer.task.teacher(images)
    kl = F.kl_div(logits.log_softmax(1), teacher_logits.log_softmax(1), log_target=True, reduction="batchmean")
    assert torch.allclose(result["tckd"] + result["nckd"], kl, rtol=1e-4)  # whatever label it is split by
    assert torch.allclose(result["task"], -(soft * logits.log_softmax(1)).sum(1).mean(), rtol=1e-4)
    smoothed = build_trainer(tiny("SOLVER.LABEL_SMOOTHING", 0.1), process).task.eval()
    expected = F.cross_entropy(smoothed(images, target)["output"], target, label_smoothing=0.1)
    assert torch.allclose(smoothed(images, target)["task"], expected)


def test_gradients_are_clipped_by_the_norm_of_all_streams(tiny: Callable, process: Process) -> None:
    for method in ("deepkd over dkd, masked", "timm's lamb"):
        clip = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01]
        trainer = build_trainer(tiny(*METHODS[method][0], *clip), process)
        trainer.task.train()
        norms, step = [], trainer.scaler.step

        def norm_then_step(optimizer: Any, norms: list = norms, step: Any = step) -> None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            step(optimizer)

        trainer.scaler.step = norm_then_step
        trainer.step(*first_batch(trainer))
        assert norms == pytest.approx([0.01], rel=1e-3)


def test_momenta_auto_sets_them_from_the_measured_ratio(tiny: Callable, process: Process) -> None:
    options = ["KD.LOSS.NAME", "dkd", "SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 4]
    trainer = build_trainer(tiny(*options), process)
    trainer.run()
    measured = suggest_momenta(trainer.auto_momenta.measured, 0.9, 0.075)
    assert trainer.auto_momenta.gsnr.count == {"tog": 4, "tcg": 4, "ncg": 4}
    assert trainer.optimizer.param_groups[0]["momenta"] == trainer.auto_momenta.momenta == measured
    for bad in (["SOLVER.OPTIMIZER", "adamw"], ["KD.LOSS.NAME", "none"]):
        with pytest.raises(UserError, match=r"SOLVER.MOMENTA auto compares the gradient streams"):
            check_config(tiny(*options, *bad), process)
    with pytest.raises(UserError, match=r"SOLVER.GSNR.WINDOW 1 .*: warmup 1 holds fewer than two samples"):
        build_trainer(tiny(*options, "SOLVER.GSNR.WINDOW", 1), process)


@pytest.mark.parametrize("method", [["KD.LOSS.NAME", "dist"], ["KD.FEATURE.NAME", "review"]])
def test_momenta_auto_are_set_where_the_losses_feed_two_streams_of_three(
    method: list, tiny: Callable, process: Process
) -> None:
    options = [*method, "SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 4]
    trainer = build_trainer(tiny(*options, "SOLVER.OPTIMIZER", "deepkd_sgd"), process)
    before = trainer.optimizer.param_groups[0]["momenta"]["tcg"]
    trainer.run()
    measured = suggest_momenta(trainer.auto_momenta.measured, 0.9, 0.075)
    assert set(measured) == {"tog", "ncg"}
    assert trainer.optimizer.param_groups[0]["momenta"] == {**measured, "tcg": before}


def test_a_compiler_that_fails_is_named_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    def broken(*graph: Any) -> None:
        raise OSError("no C++ compiler at /nonexistent")

    model, images = torch.nn.Linear(3, 2), torch.randn(4, 3)
    forward = CompiledOrPlain(model, "student", log=logging.getLogger("kd_cls"), backend=broken)
    assert torch.equal(forward(images), model(images)) and torch.equal(forward(images), model(images))
    said = {record.getMessage() for record in caplog.records if record.name == "kd_cls"}
    assert len(said) == 1 and "torch.compile of the student failed" in said.pop()


def test_compiled_networks_train_as_plain_ones(tiny: Callable, process: Process) -> None:
    losses = []
    for on in (False, True):
        trainer = build_trainer(tiny("MODEL.COMPILE", on), process)
        assert (trainer.task.compiled_student is not None) == on
        if on:
            trainer.task.compile(backend="eager")  # captures the graph, and needs no C++ compiler
        images, target, *_ = first_batch(trainer)
        losses.append(trainer.task.train()(images, target)["loss"].detach())
        assert not on or trainer.task.compiled_student.is_compiled
        assert all("_orig_mod" not in name for name in trainer.task.weights(with_factors=True)["model"])
    assert torch.allclose(*losses, rtol=1e-4)


def test_a_student_without_a_linear_classifier_is_refused_for_aekt() -> None:
    class ConvolutionalHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Conv2d(8, 10, 1)

        def get_classifier(self) -> torch.nn.Module:
            return self.head

    with pytest.raises(
        ValueError, match=r"linear classifier with a bias, and the last layer of ConvolutionalHead is Conv2d"
    ):
        Student(ConvolutionalHead(), SerializationLayer(10))
