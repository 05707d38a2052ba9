"""Memory of a distilled detector's training step:  python benchmarks/memory.py [--config-file YAML] [--size 320]

Counts bytes of tensors (`live_tensors`) in one training step of the plain student, of its teacher's part alone, and of
both, with random weights and images: what is alive when the student's backward pass begins, and the peak. Weights do
not count; the teacher's are printed below the table. Exit code 1 if distillation, on the student's proposals, keeps
more than the logits.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from figures import Bound, Table, options, write_figures
from live_tensors import LiveTensors
from torch import nn

from kd_det.config import kd_defaults, merge_file, merge_list
from kd_det.modeling.meta_arch.rcnn import DistilledRCNN

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
TOLERATED = 0.1  # of the teacher's peak: it keeps .006 of it at the defaults


def main() -> int:
    parser = options(__doc__, "memory")
    parser.add_argument("--config-file", default=str(ROOT / "configs/COCO/dkd_r18_r101.yaml"))
    parser.add_argument("--size", type=int, default=320, help="pixels of a side of every image")
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config keys, such as KD.ROWS foreground")
    args = parser.parse_args()
    cfg = kd_defaults()
    merge_file(cfg, args.config_file)
    merge_list(cfg, ["MODEL.DEVICE", "cpu", "KD.TEACHER.ALLOW_RANDOM", "True", "KD.TEACHER.WEIGHTS", "", *args.opts])
    batch = random_batch(args.images, args.size, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    plain, distilled = (build(cfg, loss) for loss in ("none", cfg.KD.LOSS.NAME))
    rows = {
        "plain student": measure_step(plain, batch),
        "teacher's part": measure_teacher(distilled, batch),
        "distilled student": measure_step(distilled, batch),
    }
    cells = [[name, *(f"{value / MIB:.1f}" for value in row)] for name, row in rows.items()]
    table = Table(["MiB", "alive when the backward pass begins", "peak"], cells)
    kept = rows["distilled student"][0] - rows["plain student"][0]
    weights = sum(p.nbytes for teacher in distilled.teachers for p in teacher.model.state_dict().values())
    print(f"{table}\n\nDistillation keeps {kept / MIB:.2f} MiB; the teacher's weights are {weights / MIB:.1f} MiB.")
    bound = Bound("what distillation keeps / the teacher's peak", kept / rows["teacher's part"][1], TOLERATED)
    return write_figures(args.json, {"memory": table}, [bound] if cfg.KD.PROPOSALS == "student" else [])


def build(cfg: CfgNode, loss: str) -> nn.Module:
    """The student with `loss`, in training, with its teacher loaded; always the same random weights."""
    cfg = cfg.clone()
    cfg.KD.LOSS.NAME = loss
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.load_teacher()
    silence_random_blocks(model)
    return model


def silence_random_blocks(model: DistilledRCNN) -> None:
    """Let the last convolution of every block return 0: else the activations of random blocks overflow, and the RPN
    proposes nothing.
    """
    for detector in (model, *(teacher.model for teacher in model.teachers)):
        for name, tensor in detector.state_dict().items():
            if name.endswith(("conv3.weight", "conv3.bias")):  # a bias is that of a folded norm
                tensor.zero_()


def random_batch(images: int, size: int, num_classes: int) -> list[dict[str, Any]]:
    """Noise images with five boxes each."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(images):
        corner = torch.rand(5, 2, generator=generator) * size / 2
        extent = size / 8 + torch.rand(5, 2, generator=generator) * size / 4
        instances = Instances((size, size), gt_boxes=Boxes(torch.cat([corner, corner + extent], dim=1)))
        instances.gt_classes = torch.randint(num_classes, (5,), generator=generator)
        image = torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def measure_step(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes alive between forward and backward pass, and the peak of both; gradients are allocated before."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    torch.manual_seed(0)
    with EventStorage(), LiveTensors() as live:
        losses = model(batch)
        loss = sum(losses.values())
        del losses
        alive = live.bytes
        loss.backward()
    return alive, live.peak


def measure_teacher(model: DistilledRCNN, batch: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes that are alive after the teachers' part, and its peak, on as many boxes as a step has."""
    count = model.roi_heads.batch_size_per_image
    boxes = [Boxes(torch.tensor([[0.0, 0, *item["image"].shape[:0:-1]]]).repeat(count, 1)) for item in batch]
    with LiveTensors() as live:
        logits = [teacher.view(batch, model.input_format).box_logits([boxes]) for teacher in model.teachers]
    del logits
    return live.bytes, live.peak


if __name__ == "__main__":
    sys.exit(main())
