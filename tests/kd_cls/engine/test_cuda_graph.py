"""SOLVER.CUDA_GRAPH: a recorded step, replayed, is the step; and what cannot be recorded is refused by its key.

Without a GPU the recorder is a tape: it keeps every operation of a step with its tensors and its numbers, as a CUDA
graph does, and runs them again on the same memory. What is baked in and should not be makes it go wrong.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.distributed import Process
from kd_cls.engine.cuda_graph import WARM_UP, GraphedStep
from kd_cls.engine.trainer import Trainer
from kd_cls.train import train
from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError

STEPS = 20
BF16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"]  # in which the CPU, too, selects by torch.topk
DEEPKD = ["KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd"]
METHODS: dict[str, list] = {
    "plain": ["SOLVER.NESTEROV", True],
    "kd, warmed up": ["KD.LOSS.NAME", "kd", "KD.LOSS.WARMUP_EPOCHS", 3],
    "dkd, clipped, averaged": [
        *["KD.LOSS.NAME", "dkd", "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5],
        *["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5],
    ],
    "deepkd, masked, matched": [*DEEPKD, "KD.LOSS.TOPK.ENABLED", True, "SOLVER.STEP", "matched", *BF16],
}


class Tape(TorchDispatchMode):
    """Runs a step and keeps its operations; `replay` runs them again, each result into the memory of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict[str, Any], Any]] = []
        self.ran = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        if not self.ran:  # a capture by CUDA runs nothing, a tape has run the step
            self.ran = True
            return
        for func, args, kwargs, first in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(first), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """Records on the CPU."""

    def __init__(self) -> None:
        self.warm_ups = 0

    def warm_up(self, run: Callable[[], None]) -> None:
        self.warm_ups += 1
        run()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            run()
        return tape.replay


def take_steps(trainer: Trainer, steps: int = STEPS) -> dict[str, Tensor]:
    """Train on four batches in turn, logging every tenth step; returns weights, average, momenta, what was logged."""
    trainer.task.train()
    batches = [(images.clone(), target.clone()) for images, target in trainer.loaders.train]
    logged = []
    for number in range(trainer.iteration, trainer.iteration + steps):
        trainer.step(*batches[number % 4], 0, torch.arange(16))
        if number % 10 == 9:
            logged += [value for name, value in trainer.meters.read(1).items() if name != "img/s"]
    state = dict(trainer.task.trainable_module.state_dict())
    if trainer.task.has_ema():
        state |= {f"ema.{name}": tensor for name, tensor in trainer.task.trainable_module_ema.module.named_parameters()}
    for place, buffers in trainer.optimizer.state_dict()["state"].items():
        state |= {f"{place}.{label}": tensor for label, tensor in buffers["momentum_buffers"].items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()} | {"logged": torch.tensor(logged)}


def graphed_and_eager(tiny: Callable, folder: Path, process: Process, options: list) -> tuple[Trainer, Trainer]:
    """Two trainers of a config; the first replays."""
    options = [*options, "SOLVER.EPOCHS", 6, "DATA.AUGMENTATION", "none"]
    graphed, eager = (
        build_trainer(tiny(*options, "OUTPUT_DIR", folder / name), process) for name in ("graphed", "eager")
    )
    recorder = None if process.device.type == "cuda" else TapeRecorder()
    graphed.graph = GraphedStep(graphed.run_step, graphed.task, graphed.optimizer, 16, recorder)
    return graphed, eager


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name].double(), tensor.double(), rtol=1e-4, atol=atol), name


@pytest.mark.parametrize("method", METHODS)
def test_twenty_recorded_steps_are_twenty_steps(method: str, tiny: Callable, process: Process, tmp_path: Path) -> None:
    graphed, eager = graphed_and_eager(tiny, tmp_path, process, METHODS[method])
    found, expected = take_steps(graphed), take_steps(eager)
    assert_same(found, expected, 1e-2 if "bfloat16" in METHODS[method] else 1e-4)
    assert graphed.iteration == eager.iteration == STEPS
    assert graphed.optimizer.param_groups[0]["lr"] == eager.optimizer.param_groups[0]["lr"]  # a number, not a tensor
    graph = graphed.graph
    assert graph.captures >= 1 and graph.recorder.warm_ups + graph.captures < STEPS


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_of_cuda_graphs_are_twenty_steps(method: str, tiny: Callable, tmp_path: Path) -> None:
    graphed, eager = graphed_and_eager(tiny, tmp_path, Process(torch.device("cuda")), METHODS[method])
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        found, expected = take_steps(graphed), take_steps(eager)
    assert_same(found, expected, 1e-2 if "bfloat16" in METHODS[method] else 1e-3)
    assert graphed.graph.captures >= 1


def test_a_tape_with_numbers_baked_in_goes_wrong(tiny: Callable, process: Process, tmp_path: Path) -> None:
    """The learning rate as a number: what the tape is there to find."""
    graphed, eager = graphed_and_eager(tiny, tmp_path, process, METHODS["plain"])
    graphed.graph.rates = [group["lr"] for group in graphed.optimizer.param_groups]
    graphed.graph.fill_numbers = lambda iteration, progress: None
    found, expected = take_steps(graphed, 10), take_steps(eager, 10)
    assert not torch.allclose(found["model.conv1.weight"], expected["model.conv1.weight"], rtol=1e-2, atol=1e-3)


def test_a_new_k_is_a_new_graph_and_a_new_learning_rate_is_not(
    tiny: Callable, process: Process, tmp_path: Path
) -> None:
    options = [*DEEPKD, "KD.LOSS.TOPK.ENABLED", True, "KD.LOSS.TOPK.PHASES", "[0.0, 0.5, 0.0]", "KD.LOSS.WARMUP", 0.5]
    graphed, _ = graphed_and_eager(tiny, tmp_path, process, [*options, *BF16])
    take_steps(graphed, 16)
    assert graphed.graph.signature[0] == 9  # all classes, after the middle of the training
    assert graphed.graph.captures == 2 and graphed.graph.recorder.warm_ups == 2 * WARM_UP


def test_other_momenta_are_a_new_graph(tiny: Callable, process: Process, tmp_path: Path) -> None:
    graphed, _ = graphed_and_eager(tiny, tmp_path, process, DEEPKD)
    take_steps(graphed, 5)
    signature = graphed.graph.current_signature(graphed.progress)
    graphed.optimizer.set_momenta({"tog": 0.9, "tcg": 0.8, "ncg": 0.9})
    assert graphed.graph.current_signature(graphed.progress) != signature == graphed.graph.signature


def test_an_incomplete_batch_runs_as_ever(tiny: Callable, process: Process, tmp_path: Path) -> None:
    graphed, eager = graphed_and_eager(tiny, tmp_path, process, ["DATA.TRAIN_IMAGES", 39])
    for trainer in (graphed, eager):
        for _ in range(4):
            trainer.task.train()
            for images, target in trainer.loaders.train:  # 16, 16 and 7 images
                trainer.step(images, target, 0, torch.arange(len(images)))
    assert graphed.graph.captures == 1 and graphed.meters.images == eager.meters.images == 4 * 39
    weights, expected = (trainer.task.trainable_module.model.fc.weight for trainer in (graphed, eager))
    assert torch.allclose(weights, expected, rtol=1e-4, atol=1e-5)


def test_a_recorded_loss_that_is_no_number_is_found(tiny: Callable, process: Process, tmp_path: Path) -> None:
    graphed, _ = graphed_and_eager(tiny, tmp_path, process, [])
    take_steps(graphed, 6)
    with torch.no_grad():
        graphed.task.trainable_module.model.fc.bias[0] = torch.nan
    graphed.iteration = 6
    images, target = next(iter(graphed.loaders.train))
    graphed.step(images, target, 0, torch.arange(16))
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 7: task"):
        graphed.meters.check(0.1)


def test_after_resume_nothing_of_the_old_graph_is_left(tiny: Callable, process: Process, tmp_path: Path) -> None:
    graphed, eager = graphed_and_eager(tiny, tmp_path, process, DEEPKD)
    take_steps(graphed, 6)
    assert graphed.graph.replay is not None
    checkpoint = graphed.task.weights(with_factors=True) | {"training": graphed.state_dict()}
    checkpoint["metadata"] = graphed.describe(graphed.iteration, graphed.max_iter, {})
    for trainer in (graphed, eager):  # the old graph moves momentum buffers that the loaded ones replace
        trainer.resume(copy.deepcopy(checkpoint))
        trainer.meters.restart()  # as `run` does
    assert graphed.graph.replay is None
    assert_same(take_steps(graphed, 6), take_steps(eager, 6), 1e-4)


@pytest.mark.parametrize(
    ("options", "world_size", "message"),
    [
        ([], 2, r"2 processes, which exchange gradients: start one"),
        (["SOLVER.OPTIMIZER", "adamw"], 1, r"SOLVER.OPTIMIZER adamw.*use sgd, dot_sgd, deepkd_sgd"),
        (["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "stream_adamw"], 1, r"SOLVER.OPTIMIZER stream_adamw"),
        (["SOLVER.ACCUMULATE_STEPS", 2], 1, r"SOLVER.ACCUMULATE_STEPS 2: set it to 1"),
        (["SOLVER.MIXUP.ALPHA", 0.2], 1, r"SOLVER.MIXUP.*set ALPHA and CUTMIX_ALPHA to 0"),
        (["KD.LOSS.NAME", "kd", "SOLVER.MOMENTA", "auto"], 1, r"SOLVER.MOMENTA auto.*leave it empty"),
        (["SOLVER.AMP.ENABLED", True], 1, r"SOLVER.AMP.DTYPE float16.*use bfloat16"),
        (["KD.LOSS.NAME", "kd", "KD.TEACHER.CACHE", "full"], 1, r"KD.TEACHER.CACHE full.*set it to none"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_by_its_key(
    options: list, world_size: int, message: str, tiny: Callable
) -> None:
    process = Process(torch.device("cuda"), world_size=world_size)
    check_config(tiny(*options), process)
    with pytest.raises(UserError, match=message) as refusal:
        check_config(tiny(*options, "SOLVER.CUDA_GRAPH", True), process)
    assert str(refusal.value).startswith("SOLVER.CUDA_GRAPH True does not go with")
    assert str(refusal.value).endswith("or set SOLVER.CUDA_GRAPH False")


def test_a_run_on_the_cpu_refuses(tiny: Callable, process: Process) -> None:
    with pytest.raises(UserError, match=r"SOLVER.CUDA_GRAPH True does not go with a run on cpu: set DEVICE cuda"):
        train(tiny("SOLVER.CUDA_GRAPH", True), process)


def test_a_loss_with_a_forward_of_its_own_refuses(tiny: Callable, process: Process) -> None:
    class Own(DKDLoss):
        def forward(self, *inputs: Any, **options: Any) -> dict[str, Tensor]:
            return super().forward(*inputs, **options)

    trainer = build_trainer(tiny("KD.LOSS.NAME", "dkd"), process)
    trainer.task.distillation = Own()
    with pytest.raises(UserError, match=r"SOLVER.CUDA_GRAPH: Own has a forward of its own.*row_terms"):
        GraphedStep(trainer.run_step, trainer.task, trainer.optimizer, 16, TapeRecorder())
