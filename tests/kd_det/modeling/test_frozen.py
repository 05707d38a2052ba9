"""Frozen layers without pretrained weights are refused."""

from pathlib import Path

import pytest
import torch

from kd_core.utils.errors import UserError
from kd_det.engine.trainer import DistillationTrainer

FROZEN = (
    "MODEL.BACKBONE.FREEZE_AT", 2, "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()",
    "DATALOADER.NUM_WORKERS", 0,
)  # fmt: skip


def weights_without(tiny_model, path, prefix):
    """A weights file of the tiny student, as ImageNet's have it: without heads, and without `prefix`."""
    state = {k: v for k, v in tiny_model().state_dict().items() if k.startswith("backbone.bottom_up.")}
    torch.save({"model": {k: v for k, v in state.items() if not k.startswith(prefix)}}, path)
    return path


def load(cfg):
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


@pytest.mark.parametrize(("lacking", "count"), [("stem.conv1.weight", 1), ("res2.1.conv1.weight", 3)])
def test_a_frozen_weight_that_the_file_lacks_is_refused_by_name(tiny_cfg, tiny_model, tmp_path, lacking, count):
    first = f"backbone.bottom_up.{lacking}"
    path = weights_without(tiny_model, tmp_path / "cut.pth", first.removesuffix("conv1.weight"))
    message = f"MODEL.WEIGHTS: .*cut.pth lacks {count} weights that stay frozen, the first is {first}: .*FREEZE_AT 0"
    with pytest.raises(UserError, match=message):
        load(tiny_cfg(*FROZEN, "MODEL.WEIGHTS", path))


def test_weights_that_are_trained_may_be_missing(tiny_cfg, tiny_model, tmp_path):
    path = weights_without(tiny_model, tmp_path / "cut.pth", "backbone.bottom_up.res5.")
    trainer = load(tiny_cfg(*FROZEN, "MODEL.WEIGHTS", path))
    frozen = [name for name, p in trainer.checkpointer.model.named_parameters() if not p.requires_grad]
    assert "backbone.bottom_up.stem.conv1.weight" in frozen
    load(tiny_cfg(*FROZEN, "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.WEIGHTS", path))
