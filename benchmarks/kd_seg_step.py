"""What a distilled segmentation's training step costs:  python benchmarks/kd_seg_step.py [--rounds N] [--json FILE]

configs/CamVid/gdkd.yaml with 19 classes and detectron2's widths, ResNet-18 ← ResNet-101 under a Semantic FPN, random
weights, on one random crop of 512 × 1024. A step costs less than that of Cityscapes' DeepLabV3, and its maps, at stride
4, have four times the pixels: the losses weigh more here. The sides take turns in one process on the same batch:

    distilled         against its floor: the plain student's step + the teacher's forward pass to its head's stride
    each loss         its forward and backward pass with the choice of its pixels, 19 × 128 × 256, against that step

The memory of the losses is counted on maps of that crop at strides 4 and 8: what a loss keeps for the backward pass,
and its peak with the gradient, each beside one map of logits. Exit code 1 if the step is above 1.05 of its floor or a
loss above 3 % of the step.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from figures import ROOT, Table, options, write_figures
from kd_dense_step import LOSS_BOUND, WORDS, judge, leaf, step_ratios, step_sides
from live_tensors import LiveTensors
from memory import random_batch
from timing import by_turns
from torch import Tensor

from kd_det import DistilledSemanticSegmentor
from kd_det.config import merge_list
from kd_det.engine.launch import read_config
from kd_det.modeling.pixels import PixelMap, PixelOptions, pixel_rows

DKD = ["KD.LOSS.NAME", "dkd", "KD.LOSS.DKD.BETA", "2.0", "KD.PIXELS.IGNORE", "label"]
LOSSES = {
    "KD": ["KD.LOSS.NAME", "kd", "KD.PIXELS.IGNORE", "label"],
    "DKD": DKD,
    "GDKD": [],
    "DeepKD (top-k)": [*DKD, "KD.LOSS.TOPK.ENABLED", "True"],
}
STRIDES = (4, 8)
NETWORK = [
    "MODEL.TIMM.NAME", "resnet18", "MODEL.TIMM.PRETRAINED", "False", "MODEL.FPN.OUT_CHANNELS", "256",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "128", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19",
]  # fmt: skip


def main() -> int:
    parser = options(__doc__, "kd_seg_step")
    parser.add_argument("--rounds", type=int, default=9, help="steps of every side that count")
    parser.add_argument("--size", type=int, default=512, help="height of the crop, which is twice as wide")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cfg = segmentor()
        teacher = cfg.clone()
        teacher.MODEL.TIMM.NAME, cfg.KD.TEACHER.CONFIG_FILE = "resnet101", str(Path(folder, "teacher.yaml"))
        Path(cfg.KD.TEACHER.CONFIG_FILE).write_text(teacher.dump())
        sides, _ = step_sides(cfg, random_batch(cfg, 1, args.size, 2 * args.size))
    maps = {stride: random_maps(args.size, 2 * args.size, stride) for stride in STRIDES}
    losses = {name: loss_on_pixels(segmentor(*words)) for name, words in LOSSES.items()}
    sides |= {name: lambda loss=loss: loss(*maps[4]).backward() for name, loss in losses.items()}
    with EventStorage(0):
        seconds = by_turns(sides, args.rounds)
    shares = [(f"{name} / distilled", seconds[name], seconds["distilled"], LOSS_BOUND) for name in LOSSES]
    table, bounds = judge([*step_ratios(seconds), *shares])
    headers = [f"stride {stride}: {what}" for stride in STRIDES for what in ("kept", "peak")]
    cells = [
        [name, *(x for stride in STRIDES for x in memory_in_maps(loss, *maps[stride]))] for name, loss in losses.items()
    ]
    memory = Table(["maps of logits", *headers], cells)
    print(table, memory, sep="\n\n")
    return write_figures(args.json, {"ratios": table, "memory": memory}, bounds)


def segmentor(*words: str) -> CfgNode:
    """The student's config, with the loss of `words`."""
    cfg = read_config(str(ROOT / "configs/CamVid/gdkd.yaml"), [])
    merge_list(cfg, [*WORDS, *NETWORK, *words])
    return cfg


def random_maps(height: int, width: int, stride: int) -> tuple[PixelMap, Tensor]:
    """The student's map of a crop with its labels, a tenth of them ignored, and the teacher's map."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 3 * torch.randn(2, 1, 19, height // stride, width // stride, generator=generator)
    labels = torch.randint(19, (1, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return PixelMap(leaf(student), labels), teacher


def loss_on_pixels(cfg: CfgNode) -> Callable[[PixelMap, Tensor], Tensor]:
    """The loss of a config on a student's and a teacher's map, in the middle of the training."""
    loss, pixels = DistilledSemanticSegmentor.build_loss(cfg), PixelOptions.from_config(cfg)
    return lambda rows, teacher: sum(loss(*pixel_rows(rows, teacher, pixels, 255), 0.5).values())


def memory_in_maps(loss: Callable[[PixelMap, Tensor], Tensor], rows: PixelMap, teacher: Tensor) -> tuple[float, float]:
    """What a loss keeps for the backward pass and its peak, the gradient included, divided by the size of a map."""
    rows.student_logits.grad = None
    with LiveTensors() as live:
        value = loss(rows, teacher)
        kept = live.bytes
        value.backward()
    return kept / teacher.nbytes, live.peak / teacher.nbytes


if __name__ == "__main__":
    sys.exit(main())
