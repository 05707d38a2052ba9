"""The teacher's features beside the student's forward pass."""

import copy

import pytest
import torch

from kd_det.modeling.teacher.teacher import PrefetchedView

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)


def test_the_teacher_comes_after_the_student_on_the_cpu_and_its_maps_are_made_once(tiny_model, batch, storage):
    model = tiny_model(*DKD, "KD.TEACHER.OVERLAP", True)
    order = []
    for name, detector in {"student": model, "teacher": model.teacher.model}.items():
        detector.backbone.register_forward_hook(lambda *_, name=name: order.append(name))
    model(batch)
    assert order == ["student", "teacher"]


@pytest.mark.gpu
@pytest.mark.parametrize("proposals", ["student", "student+teacher"])
def test_on_cuda_the_losses_and_gradients_are_those_without_a_second_stream(
    tiny_model, batch, storage, monkeypatch, proposals
):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    model = tiny_model(*DKD, "KD.PROPOSALS", proposals, "KD.TEACHER.OVERLAP", True).cuda()
    found = []
    for model.overlap in (True, False):
        for _ in range(5):  # memory of the second stream is handed out again
            torch.manual_seed(0)
            losses = model(copy.deepcopy(batch))
            model.zero_grad()
            sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append(({name: loss.item() for name, loss in losses.items()}, gradients))
    (ours, ours_grad), (plain, plain_grad) = found
    assert ours == pytest.approx(plain, rel=1e-5)
    assert ours_grad.keys() == plain_grad.keys()
    for name, gradient in plain_grad.items():  # ROIAlign adds its gradients in any order
        assert (ours_grad[name] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6, name


@pytest.mark.gpu
def test_on_cuda_features_of_the_second_stream_are_those_of_the_current_one(tiny_model, batch):
    model = tiny_model(*DKD).cuda()
    model.load_teacher()
    boxes = [[item["instances"].gt_boxes.to("cuda") for item in batch]]
    (expected,) = model.teacher.view(batch, model.input_format).box_logits(boxes)
    for _ in range(20):
        prefetched = PrefetchedView(model.device, lambda: model.teacher.view(batch, model.input_format))
        torch.randn(4096, 4096, device="cuda") @ torch.randn(4096, 4096, device="cuda")  # the current stream is busy
        (logits,) = prefetched.wait().box_logits(boxes)
        torch.testing.assert_close(logits, expected)
