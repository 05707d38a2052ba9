"""Teachers of detectron2's own projects, which need its main branch: only `make test-upstream` collects this file."""

import os
import signal
from pathlib import Path

import pytest
import torch

from helpers.few_digits import few_digits
from helpers.lazy_training import in_a_process, train, train_and_die

PROJECTS = Path(os.environ["KD_UPSTREAM"], "projects")
HEADS = ["model.roi_heads.num_classes=10"]
HEADS += [f"model.roi_heads.box_heads.{stage}.{key}" for stage in range(3) for key in ("conv_dims=[8]", "fc_dims=[16]")]
HEADS += [f"model.roi_heads.box_predictors.{stage}.input_shape.channels=16" for stage in range(3)]
NO_DROP_PATH = "model.backbone.bottom_up.drop_path_rate=0"
TEACHERS = {
    "Cascade MViTv2": (
        "MViTv2/configs/cascade_mask_rcnn_mvitv2_b_3x.py",
        "bottom_up.embed_dim=16 bottom_up.depth=4 bottom_up.last_block_indexes=[0,1,2,3]",
    ),
    "Cascade Swin": (
        "ViTDet/configs/COCO/cascade_mask_rcnn_swin_b_in21k_50ep.py",
        "bottom_up.embed_dim=16 bottom_up.depths=[1,1,1,1] bottom_up.num_heads=[1,2,4,8] square_pad=64",
    ),
    "ViTDet": (
        "ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py",
        "net.img_size=64 net.embed_dim=16 net.depth=2 net.num_heads=2 net.window_size=2 net.window_block_indexes=[0] "
        "net.drop_path_rate=0 square_pad=64",
    ),
}


def teacher_words(name: str) -> list[str]:
    """The overrides of the tiny LazyConfig student that give it this teacher, with random weights."""
    config, small = TEACHERS[name]
    overrides = [f"model.backbone.{word}" for word in small.split()]
    overrides += [*HEADS, NO_DROP_PATH] if "Cascade" in name else ["model.roi_heads.num_classes=10"]
    quoted = ",".join(f"'{word}'" for word in overrides)
    return [f"model.teacher.config_file={PROJECTS / config}", f"model.teacher.overrides=[{quoted}]"]


@pytest.mark.parametrize("name", TEACHERS)
def test_it_teaches_and_a_killed_training_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    entry, words = few_digits(tmp_path, 4), teacher_words(name)
    assert in_a_process(train, tmp_path / "whole", entry, *words) == 0, (tmp_path / "whole" / "log.txt").read_text()
    assert in_a_process(train_and_die, tmp_path / "killed", entry, *words) == -signal.SIGKILL
    assert in_a_process(train, tmp_path / "killed", entry, "--resume", *words) == 0
    whole, resumed = (torch.load(tmp_path / run / "model_final.pth")["model"] for run in ("whole", "killed"))
    assert all(torch.equal(weights, resumed[key]) for key, weights in whole.items())
