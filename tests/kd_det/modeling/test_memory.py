"""Nothing of the teacher's, and no second copy of the images, is alive during the student's backward pass."""

import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kd_det.modeling.meta_arch.rcnn import DistilledRCNN

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)


@pytest.fixture
def memory(monkeypatch):
    """benchmarks/memory.py, which the note's figures come from."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import memory

    yield memory
    for name in ("memory", "live_tensors"):
        sys.modules.pop(name, None)


def watch(detector, watched):
    """Keep a weak reference to every tensor that goes into or comes out of a module of `detector`."""

    def record(name, module, inputs, outputs):
        tensors = [x for x in tree_leaves((inputs, outputs)) if isinstance(x, Tensor)]
        watched.extend((name, weakref.ref(x)) for x in tensors)

    for name, module in detector.named_modules():
        module.register_forward_hook(lambda *call, name=name: record(name, *call))


@pytest.mark.parametrize("proposals", ["student", "student+teacher"])
def test_when_forward_returns_the_teachers_activations_are_gone(tiny_model, batch, storage, proposals):
    model = tiny_model(*DKD, "KD.PROPOSALS", proposals)
    watched = []
    watch(model.teacher.model, watched)
    losses = model(batch)
    alive = [(name, tuple(x.shape)) for name, ref in watched if (x := ref()) is not None]
    assert len(watched) > 200 and "backbone" in dict(watched)
    assert alive == []
    sum(losses.values()).backward()


def test_an_activation_that_is_kept_would_be_seen(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    watched, kept = [], []
    watch(model.teacher.model, watched)
    model.teacher.model.backbone.register_forward_hook(lambda _, __, maps: kept.append(maps["p3"]))
    model(batch)
    alive = {name for name, ref in watched if ref() is not None}
    assert "backbone" in alive and "backbone.fpn_output3" in alive


def test_no_second_copy_of_the_images_lives_on(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    seen = []
    preprocess = model.teacher.model.preprocess_image

    def watched(inputs):
        images = preprocess(inputs)
        seen.extend([weakref.ref(images.tensor), *(weakref.ref(item["image"]) for item in inputs)])
        return images

    model.teacher.model.preprocess_image = watched
    model.teacher.model.input_format = "RGB"  # another channel order than the student's: its images are copies
    model(batch)
    assert len(seen) == 3 and all(ref() is None for ref in seen)


@pytest.mark.parametrize("rows", ["all", "foreground"])
def test_distillation_keeps_logits_for_the_backward_pass_and_nothing_else(tiny_cfg, batch, memory, rows):
    overrides = ("KD.ROWS", rows, "MODEL.FPN.OUT_CHANNELS", 32, "KD.TEACHER.ALLOW_RANDOM", True)
    plain, distilled = (memory.build(tiny_cfg(*DKD, *overrides), loss) for loss in ("none", "dkd"))
    assert isinstance(distilled, DistilledRCNN)
    (alone, _), (together, peak) = (memory.measure_step(model, batch) for model in (plain, distilled))
    left, teacher_peak = memory.measure_teacher(distilled, batch)
    logits = 2 * 16 * 11 * 4  # two images of 16 rows, 10 classes and background, float32
    assert 0 < together - alone < 6 * logits < 0.05 * teacher_peak
    assert left == 0
    assert peak <= memory.measure_step(plain, batch)[1] + teacher_peak


def test_live_tensors_are_counted_by_storage_until_they_are_freed(memory):
    weight = torch.randn(100, 100, requires_grad=True)
    with memory.LiveTensors() as live:
        whole = torch.zeros(1000)
        part = whole[10:]
        assert live.bytes == 4000
        del whole
        assert live.bytes == 4000  # the view holds it
        del part
        assert live.bytes == 0
        x = torch.randn(10, 100)
        y = (x @ weight.t()).exp().sum()
        assert live.bytes == 4000 + 4000 + 4  # x, and the exponential that the backward pass needs; not the product
        y.backward()
        del x, y
        assert live.bytes == weight.grad.nbytes == 40_000
        assert live.peak >= 48_000  # the weight gradient beside the two
