"""A distilled step makes the host wait for the device no more often than a plain step and its teacher do.

Reads of values, and shapes that depend on values, are counted on the CPU for each package; on CUDA each of them makes
the host wait. detectron2's own step has dozens: sampling, NMS, ROI pooling's assignment of boxes to levels, and the
losses, which `SimpleTrainer.write_metrics` reads one by one in every iteration.
"""

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.tiny_detector import make_batch
from kd_core.losses import KDLoss
from kd_det.engine.train_step import AsyncScalars, build_step, mean
from kd_det.solver import build_optimizer

READING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")
OURS, THEIRS = ("kd_core", "kd_det"), ("detectron2",)
DEEPKD = ("SOLVER.OPTIMIZER", "deepkd_sgd")
MASK = ("KD.LOSS.TOPK.ENABLED", True)
METHODS = {
    "kd": ("KD.LOSS.NAME", "kd"),
    "dkd, masked, warmed up, weighted": (
        *("KD.LOSS.NAME", "dkd", "KD.LOSS.WARMUP_ITERS", 9, *MASK, "KD.ROWS", "weighted"),
    ),
    "aekt": ("KD.LOSS.NAME", "aekt"),
    "deepkd": ("KD.LOSS.NAME", "dkd", *DEEPKD, *MASK),
    "deepkd over gdkd, bfloat16, clipped": (
        *("KD.LOSS.NAME", "gdkd", *DEEPKD, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16"),
        *("SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"),
    ),
}
SMALL = (  # few and narrow layers
    "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "resnet10t",
    "MODEL.TIMM.KWARGS", "[['channels', [8, 8, 16, 16]], ['stem_width', 8]]",
)  # fmt: skip
CLIPPING = 1  # on the CPU only: whether the norm is so small that nothing has to be multiplied


class HostReads(TorchDispatchMode):
    """Counts reads by the package that asks for them: ours, or detectron2."""

    def __init__(self) -> None:
        super().__init__()
        self.of: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if masks or func.overloadpacket.__name__ in READING:
            for frame, _ in traceback.walk_stack(None):  # from the innermost outwards
                path = Path(frame.f_code.co_filename)
                if package := {*path.parts} & {*OURS, *THEIRS} if path.name != Path(__file__).name else None:
                    self.of["ours" if package & {*OURS} else "detectron2's"] += 1
                    break
        return func(*args, **(kwargs or {}))


def reads(cfg, model) -> Counter[str]:
    """Those of the second of two steps."""
    trainer = build_step(cfg, model.train(), [make_batch(), make_batch()], build_optimizer(cfg, model))
    for trainer.iter in range(2):
        torch.manual_seed(0)
        with HostReads() as found:
            trainer.run_step()
    return found.of


def of_teacher(model) -> int:
    """Those of the teacher's backbone and box head alone."""
    batch = make_batch()
    with HostReads() as found:
        model.teacher.view(batch, "BGR").box_logits([[item["instances"].gt_boxes for item in batch]])
    assert not found.of["ours"]
    return found.of["detectron2's"]


def of_loss(loss, classes: int = 11) -> int:
    """Those of the loss alone: it checks values where that costs nothing, on the CPU."""
    torch.manual_seed(0)
    with HostReads() as found:
        loss(torch.randn(6, classes), torch.randn(6, classes), torch.arange(6), 0.5)
    return found.of["ours"]


def test_a_step_reads_what_a_plain_one_and_the_teacher_read_and_the_terms_for_the_log(tiny_cfg, tiny_model, storage):
    plain_options = ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *SMALL)
    plain = reads(tiny_cfg(*plain_options), tiny_model(*plain_options))["detectron2's"]
    for name, options in METHODS.items():
        model = tiny_model(*SMALL, *options)
        found = reads(tiny_cfg(*SMALL, *options), model)
        assert found["detectron2's"] == plain + of_teacher(model) + len(model.loss.streams), name
        assert found["ours"] <= of_loss(model.loss) + CLIPPING * ("clipped" in name), name


def test_selecting_foreground_rows_must_read_how_many_there_are(tiny_cfg, tiny_model, storage):
    options = ("KD.LOSS.NAME", "dkd", "KD.ROWS", "foreground")
    model = tiny_model(*SMALL, *options)
    assert reads(tiny_cfg(*SMALL, *options), model)["ours"] > of_loss(model.loss)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any())])
def test_a_read_of_ours_would_be_seen(monkeypatch, read):
    loss = KDLoss()
    row_terms, before = loss.row_terms, of_loss(loss, classes=7)
    monkeypatch.setattr(loss, "row_terms", lambda student, *rest: (read(student), row_terms(student, *rest))[1])
    assert of_loss(loss, classes=7) == before + 1


def test_losses_of_several_micro_batches_are_averaged_on_the_host():
    first, second = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor([2.0])}, {"a": torch.tensor(0.5)}
    means = mean([AsyncScalars(first), AsyncScalars(second)])
    assert means == {"a": 0.75, "b": 1.0} and not means["a"].requires_grad


@pytest.mark.gpu
def test_on_cuda_a_copy_is_of_the_values_at_the_time_and_reading_it_waits_for_no_more():
    loss = torch.full((), 3.0, device="cuda")
    copied = AsyncScalars({"loss": loss})
    torch.cuda._sleep(1_000_000_000)  # cycles: about half a second
    loss.zero_()
    behind = torch.cuda.Event()
    behind.record()
    assert copied.read() == {"loss": 3.0} and not behind.query()
