"""What a distilled RetinaNet's training step costs:  python benchmarks/kd_dense_step.py [--rounds N] [--json FILE]

configs/COCO/dkd_retinanet_r18_r101.yaml (ResNet-18 ← ResNet-101, 80 classes, random weights) on one random image of
--size pixels. The sides take turns in one process on the same batch:

    distilled         against its floor: the plain student's step + the teacher's backbone and class branch alone
    losses            forward and backward of the loss on the logits of every level, against the distilled step

Exit code 1 if the step is above 1.05 of its floor or the losses above 3 % of the step.
"""

import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from figures import ROOT, Bound, Table, judged, options, write_figures
from memory import random_batch
from timing import by_turns
from torch import nn

from kd_det.config import merge_list
from kd_det.engine.launch import read_config

STEP_BOUND, LOSS_BOUND = 1.05, 0.03
WORDS = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN",
    "KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True",
]  # fmt: skip


def main() -> int:
    parser = options(__doc__, "kd_dense_step")
    parser.add_argument("--rounds", type=int, default=9, help="steps of every side that count")
    parser.add_argument("--size", type=int, default=320, help="pixels of a side of the image")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, such as KD.DENSE.GAMMA 0.0")
    args = parser.parse_args()
    cfg = read_config(str(ROOT / "configs/COCO/dkd_retinanet_r18_r101.yaml"), WORDS)
    merge_list(cfg, args.opts)
    batch = random_batch(1, args.size, cfg.MODEL.RETINANET.NUM_CLASSES)
    plain, distilled = build(cfg, "none"), build(cfg, cfg.KD.LOSS.NAME)
    losses, rows = losses_alone(distilled, batch)
    sides = {
        "plain": step_of(plain, batch),
        "distilled": step_of(distilled, batch),
        "teacher alone": teacher_alone(distilled, batch),
        "losses": losses,
    }
    with EventStorage(0):
        seconds = by_turns(sides, args.rounds)
    floor = [sum(parts) for parts in zip(seconds["plain"], seconds["teacher alone"], strict=True)]
    pairs = {
        "distilled / (plain + teacher alone)": ("distilled", floor, STEP_BOUND),
        f"losses on {rows} × {cfg.MODEL.RETINANET.NUM_CLASSES} logits / distilled": (
            "losses", seconds["distilled"], LOSS_BOUND,
        ),
        "distilled / plain": ("distilled", seconds["plain"], None),
    }  # fmt: skip
    bounds, cells = [], []
    for name, (side, other, bound) in pairs.items():
        ratio = statistics.median(a / b for a, b in zip(seconds[side], other, strict=True))
        medians = (1e3 * statistics.median(times) for times in (seconds[side], other))
        cells.append([name, *medians, judged(ratio, bound, digits=4)])
        if bound is not None:
            bounds.append(Bound(name, ratio, bound))
    table = Table(["", "ms", "floor or other side, ms", "ratio (bound)"], cells)
    print(table)
    return write_figures(args.json, {"ratios": table}, bounds)


def build(cfg: CfgNode, loss: str) -> nn.Module:
    """The student with `loss`, in training, with its teacher loaded; always the same random weights."""
    cfg = cfg.clone()
    cfg.KD.LOSS.NAME = loss
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.load_teacher()
    return model


def step_of(model: nn.Module, batch: list[dict[str, Any]]) -> Callable[[], None]:
    """One training step, at learning rate 0."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        sum(model(batch).values()).backward()
        optimizer.step()

    return step


def teacher_alone(model: nn.Module, batch: list[dict[str, Any]]) -> Callable[[], object]:
    """The teacher's backbone and class branch."""
    rows = captured(model, batch)
    return lambda: model.teacher_logits(model.teacher.view(batch, model.input_format), rows)


def losses_alone(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[Callable[[], None], int]:
    """Forward and backward of the loss on every level, and how many anchors that are."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = model.loss.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with EventStorage(0):
        model(batch)
    handle.remove()
    levels = [(student.detach().requires_grad_(), others, kwargs) for (student, *others), kwargs in calls]

    def losses() -> None:
        for student, others, kwargs in levels:
            student.grad = None
            sum(model.loss(student, *others, **kwargs).values()).backward()

    return losses, sum(len(student) for student, *_ in levels)


def captured(model: nn.Module, batch: list[dict[str, Any]]) -> list[Any]:
    """The student's rows of a batch."""
    seen: list[Any] = []
    compute = model.distillation_losses
    model.distillation_losses = lambda views, rows: seen.extend(rows) or compute(views, rows)
    with EventStorage(0):
        model(batch)
    del model.distillation_losses
    return seen


if __name__ == "__main__":
    sys.exit(main())
