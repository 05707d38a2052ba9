"""The meta-architecture of docs/new_meta_architecture.md is distilled as it stands on the page."""

import re

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from torch.testing import assert_close

from kd_core import KDLoss
from kd_det.config.student import plain_config

from ..conftest import ROOT

CODE = re.search(r"```python\n(.*?)```", (ROOT / "docs/new_meta_architecture.md").read_text(), re.DOTALL)[1]
OWN = ("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']")


@pytest.fixture
def page():
    """The page's code, run; its classes leave detectron2's registry afterwards."""
    exec(CODE, {"__name__": "page"})
    yield
    for name in ("ImageClassifier", "DistilledImageClassifier"):
        META_ARCH_REGISTRY._obj_map.pop(name)


def test_the_pages_model_learns_from_a_teacher_and_is_plain_without_one(page, tiny_cfg, tmp_path, storage):
    teacher = tmp_path / "image_teacher.yaml"
    teacher.write_text(tiny_cfg(*OWN, "MODEL.META_ARCHITECTURE", "DistilledImageClassifier").dump())
    loss = ("KD.LOSS.NAME", "kd", "KD.LOSS.TEMPERATURE", 2.0, "KD.TEACHER.CONFIG_FILE", teacher)
    cfg = tiny_cfg(*OWN, "MODEL.META_ARCHITECTURE", "DistilledImageClassifier", *loss)
    batch = [{"image": torch.randint(256, (3, 64, 64)), "label": label} for label in (3, 7)]
    torch.manual_seed(0)
    model, plain = build_model(cfg).train(), build_model(plain_config(cfg)).train()
    assert type(plain).__name__ == "ImageClassifier"
    plain.load_state_dict(model.state_dict())
    losses = model(batch)
    assert torch.equal(losses["loss_cls"], plain(batch)["loss_cls"])
    theirs = model.teacher.model
    with torch.no_grad():
        images = torch.stack([item["image"] for item in batch]) - theirs.pixel_mean
        logits = theirs.classifier(theirs.backbone(images)["res4"].mean((2, 3)))
    ours = model.classifier(model.backbone(images)["res4"].mean((2, 3)))
    expected = KDLoss(temperature=2.0)(ours, logits, torch.tensor([3, 7]))
    assert_close({name: losses[f"loss_kd_{name}"] for name in expected}, expected)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(batch), plain.eval()(batch))
