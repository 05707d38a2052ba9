"""What a distilled detector's training step costs:  python benchmarks/kd_det_step.py [--peer DIR] [--json FILE]

On the built-in digits, ResNet-18 FPN ← ResNet-50 FPN with random weights, 4 images of 192 px. The sides take turns in
one process on the same batches:

    KD                against its floor: the plain student's step + the teacher's backbone and box head alone
    DeepKD (DKD)      against its floor: KD's step + a second backward pass + the difference of the optimizers
    DKD               against the papers' own detection step (--peer: a checkout of mdistiller, which is only read);
                      ours, and ours with KD.CHANNELS_LAST
    ReviewDKD         against the papers' own, likewise; both fuse the maps to the teacher's 64 channels

Our teachers run with KD.TEACHER.CHANNELS_LAST, which pays on a CPU; it is off by default.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from figures import parts_of_step, report_steps, step_options
from timing import by_turns, timed
from torch import nn

from kd_core.streams import backward_streams
from kd_det.analysis.iteration import Iteration, build_iteration
from kd_det.config import merge_list
from kd_det.engine.launch import choose_device, read_config
from kd_det.engine.train_step import stream_losses

ROOT = Path(__file__).resolve().parents[1]
DIGITS = ROOT / "configs" / "Digits"
# ResNet-18 takes the whole width of the base; FPN and box head are those of the digits' teacher.
STUDENT = {
    "MODEL.RESNETS.DEPTH": "18",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "64",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "64",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.FPN.OUT_CHANNELS": "64",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "256",
}
PAPERS = {"dkd": "DKD", "reviewdkd": "ReviewDKD"}
FAST_TEACHER = ("KD.TEACHER.CHANNELS_LAST", "True")
TEACHER_YAML = "_BASE_: {base}\nMODEL:\n  RESNETS:\n    DEPTH: 50\n"


def main() -> int:
    parser = step_options(__doc__, "kd_det_step", peer="mdistiller")
    args = parser.parse_args()
    sides = build_sides(args.peer)
    seconds = by_turns(sides, args.rounds)
    rows = table_rows(seconds, peer=args.peer is not None)
    parts = {name: seconds[name] for name in ("plain", "teacher alone", "second backward")}
    parts["StreamSGD beyond SGD"] = [a - b for a, b in zip(seconds["StreamSGD"], seconds["SGD"], strict=True)]
    return report_steps(seconds, rows, args.json, parts_of_step(seconds["DeepKD (DKD)"], parts))


def build_sides(peer: Path | None) -> dict[str, Callable[[], object]]:
    """Every side, as a function that runs one step."""
    plain, kd, dkd, deepkd, review = map(iteration_of, ("baseline", "kd", "dkd", "deepkd", "reviewdkd"))
    sides = {
        "plain": plain,
        "KD": kd,
        "DKD": dkd,
        "DeepKD (DKD)": deepkd,
        "ReviewDKD": review,
        "teacher alone": teacher_alone(kd),
        "second backward": second_backward(deepkd),
        "SGD": kd.step.optimizer.step,
        "StreamSGD": stream_step(deepkd),
    }
    if peer is not None:
        words = ["KD.TEACHER.FOLD_BN", "False"]  # theirs has a teacher as its yaml builds it
        for name, title in PAPERS.items():
            sides[f"the papers' {title}"] = papers_step(peer, title, iteration_of(name, words))
            sides[f"{title}, channels last"] = iteration_of(name, [*FAST_TEACHER, "KD.CHANNELS_LAST", "True"])
    return sides


def iteration_of(name: str, words: Sequence[str] = FAST_TEACHER) -> Iteration:
    """The iteration of a config of configs/Digits, with the student and the teacher of this benchmark."""
    torch.manual_seed(0)  # the same weights on every side
    with tempfile.TemporaryDirectory() as folder:
        cfg = step_cfg(DIGITS / f"{name}.yaml", Path(folder))
        merge_list(cfg, list(words))
        choose_device(cfg, num_gpus=1)
        return build_iteration(cfg)


def step_cfg(path: Path, folder: Path) -> CfgNode:
    """The config in `path` with that student and, if it has a loss, that teacher, whose yaml is written to `folder`."""
    cfg = read_config(str(path), list(chain(*STUDENT.items())))
    if cfg.KD.LOSS.NAME != "none":
        teacher = folder / "teacher.yaml"
        teacher.write_text(TEACHER_YAML.format(base=DIGITS / "Base-Digits.yaml"))
        words = ["KD.TEACHER.CONFIG_FILE", str(teacher), "KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]
        merge_list(cfg, words)
    return cfg


def teacher_alone(iteration: Iteration) -> Callable[[], object]:
    """The teacher's backbone, and its box head on the boxes that the student sampled for a batch."""
    model, batch = iteration.model, iteration.batches[0]
    boxes: list[Any] = []
    given = model.teacher.view

    def remember(*args: Any) -> Any:
        view = given(*args)
        logits = view.box_logits
        view.box_logits = lambda stages: boxes.append(stages) or logits(stages)
        return view

    model.teacher.view = remember
    iteration.recorded(lambda: model(batch))
    del model.teacher.view
    return lambda: given(batch, model.input_format).box_logits(boxes[0])


def second_backward(iteration: Iteration) -> Callable[[], float]:
    """The backward pass of DeepKD's `tcg` set alone; the returned time excludes the forward pass."""
    model, batch = iteration.model, iteration.batches[0]

    def run() -> float:
        losses = stream_losses(iteration.recorded(lambda: model(batch)), iteration.step.streams)
        params = [p for p in model.parameters() if p.requires_grad]
        return timed(lambda: torch.autograd.grad(losses["tcg"], params, allow_unused=True))

    run.times_itself = True
    return run


def stream_step(iteration: Iteration) -> Callable[[], float]:
    """The stream optimizer's step alone, its gradients given."""
    model, optimizer, batch = iteration.model, iteration.step.optimizer, iteration.batches[0]

    def run() -> float:
        backward_streams(stream_losses(iteration.recorded(lambda: model(batch)), iteration.step.streams), optimizer)
        seconds = timed(optimizer.step)
        optimizer.zero_grad()
        return seconds

    run.times_itself = True
    return run


def papers_step(peer: Path, method: str, ours: Iteration) -> Callable[[], None]:
    """The step of mdistiller's detection code on the modules of `ours`, under detectron2's own trainer."""
    sys.path[:0] = [str(peer), str(peer / "detection")]
    from model import rcnn
    from model.reviewkd import ReviewKD

    levels = [int(STUDENT["MODEL.FPN.OUT_CHANNELS"])] * 5
    rcnn.build_kd_trans = lambda _: ReviewKD(levels, levels, levels[0])  # theirs always has 256 channels
    student, teacher = ours.model, ours.model.teacher.model
    dkd, review = SimpleNamespace(ALPHA=1.0, BETA=0.25, T=1.0), SimpleNamespace(LOSS_WEIGHT=1.0)
    options = SimpleNamespace(TYPE=method, DKD=dkd, REVIEWKD=review)
    theirs = rcnn.RCNNKD(
        backbone=student.backbone,
        proposal_generator=student.proposal_generator,
        roi_heads=student.roi_heads,
        teacher=nn.ModuleDict({"backbone": teacher.backbone, "roi_heads": teacher.roi_heads}),
        kd_args=options,
        pixel_mean=student.pixel_mean.flatten().tolist(),
        pixel_std=student.pixel_std.flatten().tolist(),
        teacher_pixel_mean=teacher.pixel_mean.flatten().tolist(),
        teacher_pixel_std=teacher.pixel_std.flatten().tolist(),
        input_format=student.input_format,
        teacher_input_format=teacher.input_format,
    )
    theirs.train(), theirs.teacher.eval()
    groups = [*ours.step.optimizer.param_groups]
    if method == "ReviewDKD":
        groups = [{"params": [p for p in theirs.parameters() if p.requires_grad]}]
    optimizer = type(ours.step.optimizer)(groups, lr=0.0)
    return Iteration(theirs, ours.batches, SimpleTrainer(theirs, Endless(ours.batches), optimizer), EventStorage(0))


class Endless:
    """A list of batches, repeated forever."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        while True:
            yield from self.batches


def table_rows(seconds: dict[str, list[float]], peer: bool) -> list[list[Any]]:
    """Each measured side, its reference, and the median over the rounds of their ratio."""

    def total(*names: str) -> list[float]:
        return [sum(parts) for parts in zip(*(seconds[name] for name in names), strict=True)]

    deepkd_floor = [
        kd + second + streams - sgd
        for kd, second, streams, sgd in zip(
            *(seconds[name] for name in ("KD", "second backward", "StreamSGD", "SGD")), strict=True
        )
    ]
    pairs = [
        ("KD / (plain + teacher alone)", seconds["KD"], total("plain", "teacher alone"), 1.05),
        ("DeepKD / its parts", seconds["DeepKD (DKD)"], deepkd_floor, 1.05),
        ("KD / plain", seconds["KD"], seconds["plain"], None),
        ("DKD / plain", seconds["DKD"], seconds["plain"], None),
        ("DeepKD / KD", seconds["DeepKD (DKD)"], seconds["KD"], None),
    ]
    if peer:
        for method, bound in (("DKD", 0.85), ("ReviewDKD", 0.9)):
            papers = seconds[f"the papers' {method}"]
            pairs.append((f"{method} / the papers' {method}", seconds[method], papers, None))
            fast = f"{method}, channels last"
            pairs.append((f"{fast} / the papers' {method}", seconds[fast], papers, bound))
    return [
        [name, 1e3 * statistics.median(ours), 1e3 * statistics.median(other),
         statistics.median(a / b for a, b in zip(ours, other, strict=True)), bound]
        for name, ours, other, bound in pairs
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
