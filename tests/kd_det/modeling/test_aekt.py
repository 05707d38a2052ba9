"""AEKT's layer in a detector: identity at first, merged in what is saved, its factors back on resume."""

import copy

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.testing import assert_close

from kd_det.engine.trainer import DistillationTrainer
from kd_det.modeling.aekt import build_serialization, classifiers
from kd_det.solver import build_optimizer

AEKT = ("KD.LOSS.NAME", "aekt", "KD.LOSS.TEMPERATURE", 1.0)
HEADS = [
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.01),
    (
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST",
        0.01,
        "MODEL.ROI_HEADS.NAME",
        "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        True,
    ),
]


def disturb(model):
    """Move layers and classifiers away from where they start."""
    with torch.no_grad():
        for _, classifier, layer in classifiers(model):
            for p in (*classifier.parameters(), *layer.parameters()):
                p += torch.randn_like(p) * 0.02
    return model


@pytest.mark.parametrize("head", HEADS)
def test_what_is_saved_is_a_plain_detector_that_detects_the_same(tiny_model, batch, head):
    model = disturb(tiny_model(*AEKT, *head)).eval()
    plain = tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *head).eval()
    plain.load_state_dict(model.state_dict())  # strict: the same names
    again = tiny_model(*AEKT, *head).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs, loaded = (detector(batch)[0]["instances"] for detector in (model, plain, again))
        free = tiny_model(*AEKT, *head).eval()(batch)[0]["instances"]
    assert len(ours) > 0 and free.scores.tolist() != ours.scores.tolist()
    for other in (theirs, loaded):
        assert_close(other.scores, ours.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(other.pred_classes, ours.pred_classes)


def test_the_first_losses_are_those_without_the_layer(tiny_model, batch, storage):
    model = tiny_model(*AEKT)
    twin = copy.deepcopy(model)
    twin.serialization = None
    losses = [(torch.manual_seed(0), detector.train()(batch))[1] for detector in (model, twin)]
    assert {"loss_kd_explicit", "loss_kd_implicit"} <= set(losses[0])
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[1])


def test_the_layer_learns_to_classify_and_not_to_distil(tiny_model, batch, storage):
    model = disturb(tiny_model(*AEKT))
    losses = model.train()(batch)
    layer = model.serialization[0].weight
    (losses["loss_kd_explicit"] + losses["loss_kd_implicit"]).backward(retain_graph=True)
    assert layer.grad is None
    losses["loss_cls"].backward()
    assert layer.grad.abs().sum() > 0


@pytest.mark.parametrize("optimizer", ["sgd", "deepkd_sgd"])
def test_the_layer_does_not_decay(tiny_cfg, tiny_model, optimizer):
    model = tiny_model(*AEKT)
    groups = build_optimizer(tiny_cfg(*AEKT, "SOLVER.OPTIMIZER", optimizer), model).param_groups
    free = {p for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert set(model.serialization.parameters()) <= free
    assert model.roi_heads.box_predictor.cls_score.weight not in free
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_predictor_without_a_linear_classifier_is_refused(tiny_model):
    heads = tiny_model().roi_heads
    heads.box_predictor.cls_score = nn.Identity()
    with pytest.raises(
        ValueError, match="a linear classifier with a bias, cls_score, but that of FastRCNNOutputLayers"
    ):
        build_serialization(heads)


def test_a_resumed_run_has_the_factors_of_an_undisturbed_one(tiny_cfg, tmp_path):
    cfg = tiny_cfg(
        *AEKT, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.005, "SOLVER.IMS_PER_BATCH", 2, "SEED", 1,
        "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TRAIN", "('digits_train',)",
        "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    (tmp_path / "output").mkdir()
    parameters = []
    for resume in (False, True):
        seed_all_rng(1)
        trainer = DistillationTrainer(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        parameters.append({name: p.detach().clone() for name, p in trainer._trainer.model.named_parameters()})
        (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    assert not torch.equal(parameters[0]["serialization.0.weight"], torch.eye(11))
    assert all(torch.equal(p, parameters[1][name]) for name, p in parameters[0].items())
