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
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from figures import ROOT, Bound, Table, judged, options, write_figures
from memory import random_batch, student_rows
from timing import by_turns
from torch import Tensor, nn

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
    batch = random_batch(cfg, 1, args.size, args.size)
    sides, distilled = step_sides(cfg, batch)
    rows = [replace(level, student_logits=leaf(level.student_logits)) for level in student_rows(distilled, batch)]
    logits = sides["teacher alone"]()
    pairs = list(zip(rows, logits, strict=True))
    sides["losses"] = lambda: [sum(distilled.row_loss(*pair).values()).backward() for pair in pairs]
    with EventStorage(0):
        seconds = by_turns(sides, args.rounds)
    size = f"{sum(len(level.student_logits) for level in rows)} × {cfg.MODEL.RETINANET.NUM_CLASSES}"
    ratios = step_ratios(seconds)
    ratios.insert(1, (f"losses on {size} logits / distilled", seconds["losses"], seconds["distilled"], LOSS_BOUND))
    table, bounds = judge(ratios)
    print(table)
    return write_figures(args.json, {"ratios": table}, bounds)


def leaf(logits: Tensor) -> Tensor:
    """Logits whose gradient ends there."""
    return logits.detach().requires_grad_()


def step_sides(cfg: CfgNode, batch: list[dict[str, Any]]) -> tuple[dict[str, Callable[[], Any]], nn.Module]:
    """The plain student's step, the distilled one and the teacher's part, each as a function; the distilled model."""
    plain, distilled = build(cfg, "none"), build(cfg, cfg.KD.LOSS.NAME)
    rows = student_rows(distilled, batch)
    sides = {
        "plain": step_of(plain, batch),
        "distilled": step_of(distilled, batch),
        "teacher alone": lambda: distilled.teacher_logits(distilled.teacher.view(batch, distilled.input_format), rows),
    }
    return sides, distilled


Ratio = tuple[str, list[float], list[float], float | None]


def step_ratios(seconds: dict[str, list[float]]) -> list[Ratio]:
    """The distilled step against its floor and against the plain step: name, both sides' seconds, bound."""
    floor = [sum(parts) for parts in zip(seconds["plain"], seconds["teacher alone"], strict=True)]
    return [
        ("distilled / (plain + teacher alone)", seconds["distilled"], floor, STEP_BOUND),
        ("distilled / plain", seconds["distilled"], seconds["plain"], None),
    ]


def judge(ratios: list[Ratio]) -> tuple[Table, list[Bound]]:
    """The median ratio of every pair as a table, and the bounds."""
    bounds, cells = [], []
    for name, side, other, bound in ratios:
        ratio = statistics.median(a / b for a, b in zip(side, other, strict=True))
        medians = (1e3 * statistics.median(times) for times in (side, other))
        cells.append([name, *medians, judged(ratio, bound, digits=4)])
        if bound is not None:
            bounds.append(Bound(name, ratio, bound))
    return Table(["", "ms", "floor or other side, ms", "ratio (bound)"], cells), bounds


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


if __name__ == "__main__":
    sys.exit(main())
