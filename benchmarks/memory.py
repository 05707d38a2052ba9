"""Memory of a distilled training step:  python benchmarks/memory.py [--config-file YAML] [--size 320]

Of any meta-architecture with a yaml config. Counts bytes of tensors (`live_tensors`) in one training step of the plain
student, of its teacher's part alone, and of both, with random weights and images: what is alive when the student's
backward pass begins, and the peak. Weights do not count; the teacher's are printed below the table. Exit code 1 if
distillation, on the student's proposals, keeps more than a few matrices of the logits.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from figures import Bound, Table, options, write_figures
from live_tensors import LiveTensors
from torch import nn

from kd_core.utils.config import lookup
from kd_det.config import kd_defaults, merge_file, merge_list
from kd_det.modeling.rows import Rows

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20
TOLERATED = 5.0  # matrices of the logits: RetinaNet keeps 1, DKD of boxes 2, GDKD of pixels 3, a top-k mask 4


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
    batch = random_batch(cfg, args.images, args.size, args.size)
    plain, distilled = build(cfg, "none"), build(cfg, cfg.KD.LOSS.NAME)
    rows = {
        "plain student": measure_step(plain, batch),
        "teacher's part": measure_teacher(distilled, batch),
        "distilled student": measure_step(distilled, batch),
    }
    if cfg.KD.FEATURE.NAME != "none":
        rows["with feature maps, too"] = measure_step(build(cfg, cfg.KD.LOSS.NAME, cfg.KD.FEATURE.NAME), batch)
    cells = [[name, *(f"{value / MIB:.1f}" for value in row)] for name, row in rows.items()]
    table = Table(["MiB", "alive when the backward pass begins", "peak"], cells)
    kept = rows["distilled student"][0] - rows["plain student"][0]
    weights = sum(p.nbytes for teacher in distilled.teachers for p in teacher.model.state_dict().values())
    print(f"{table}\n\nDistillation keeps {kept / MIB:.2f} MiB; the teacher's weights are {weights / MIB:.1f} MiB.")
    logits = sum(level.student_logits.nbytes for level in student_rows(distilled, batch))
    bound = Bound("what distillation keeps / the logits", kept / logits, TOLERATED)
    return write_figures(args.json, {"memory": table}, [bound] if cfg.KD.PROPOSALS == "student" else [])


def build(cfg: CfgNode, loss: str, feature: str = "none") -> nn.Module:
    """The student with these losses, in training, with its teacher loaded; always the same random weights."""
    cfg = cfg.clone()
    cfg.KD.LOSS.NAME, cfg.KD.FEATURE.NAME = loss, feature
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.load_teacher()
    silence_random_blocks(model)
    return model


def silence_random_blocks(model: nn.Module) -> None:
    """Let the last convolution of every block return 0: else the activations of random blocks overflow, and the RPN
    proposes nothing.
    """
    for detector in (model, *(teacher.model for teacher in model.teachers)):
        for name, tensor in detector.state_dict().items():
            if name.endswith(("conv3.weight", "conv3.bias")):  # a bias is that of a folded norm
                tensor.zero_()


def random_batch(cfg: CfgNode, images: int, height: int, width: int) -> list[dict[str, Any]]:
    """Noise images with five boxes each, and label maps of blobs of which a tenth of the pixels is ignored."""
    generator = torch.Generator().manual_seed(0)
    num_classes = lookup(cfg, META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE).class_keys[0])
    head, whole = cfg.MODEL.SEM_SEG_HEAD, torch.tensor([width, height])
    batch = []
    for _ in range(images):
        corner = torch.rand(5, 2, generator=generator) * whole / 2
        extent = whole / 8 + torch.rand(5, 2, generator=generator) * whole / 4
        instances = Instances((height, width), gt_boxes=Boxes(torch.cat([corner, corner + extent], dim=1)))
        instances.gt_classes = torch.randint(num_classes, (5,), generator=generator)
        image = torch.randint(256, (3, height, width), generator=generator, dtype=torch.uint8)
        if cfg.MODEL.MASK_ON:
            boxes = instances.gt_boxes.tensor.double().numpy()
            instances.gt_masks = PolygonMasks([[box[[0, 1, 2, 1, 2, 3, 0, 3]]] for box in boxes])
        blobs = torch.randint(head.NUM_CLASSES, (height // 32 + 1, width // 32 + 1), generator=generator)
        labels = blobs.repeat_interleave(32, 0).repeat_interleave(32, 1)[:height, :width].clone()
        labels[torch.rand(labels.shape, generator=generator) < 0.1] = head.IGNORE_VALUE
        batch.append({"image": image, "instances": instances, "sem_seg": labels})
    return batch


def student_rows(model: nn.Module, batch: list[dict[str, Any]]) -> Sequence[Rows]:
    """The rows on which a step compares student and teacher."""
    seen: list[Sequence[Rows]] = []
    compute = model.teacher_logits
    model.teacher_logits = lambda view, rows: seen.append(rows) or compute(view, rows)
    with EventStorage():
        model(batch)
    del model.teacher_logits
    return seen[0]


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


def measure_teacher(model: nn.Module, batch: list[dict[str, Any]]) -> tuple[int, int]:
    """Bytes that are alive after the teachers' part on the student's rows, and its peak."""
    rows = student_rows(model, batch)
    with LiveTensors() as live:
        logits = [model.teacher_logits(teacher.view(batch, model.input_format), rows) for teacher in model.teachers]
    del logits
    return live.bytes, live.peak


if __name__ == "__main__":
    sys.exit(main())
