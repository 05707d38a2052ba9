"""The step over gradient streams against detectron2's plain step, and what it adds."""

import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.env import seed_all_rng
from torch.testing import assert_close

from helpers.tiny_detector import make_batch
from kd_det.engine.train_step import StreamTrainer, build_step, stream_losses
from kd_det.engine.trainer import DistillationTrainer
from kd_det.solver import build_optimizer

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
DEEPKD = (*DKD, "SOLVER.OPTIMIZER", "deepkd_sgd")
CLIP = (
    "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE",
)  # fmt: skip
WHOLE = tuple("full_model" if word == "norm" else word for word in CLIP)
EQUAL = tuple(word for name in ("TOG", "TCG", "NCG") for word in (f"SOLVER.DEEPKD.DELTA_{name}", 0.0))


@pytest.fixture
def pinned(monkeypatch):
    """Anchors and proposals are sampled in their order, so that an image's sample does not depend on its batch.

    And a float64 detector finds proposals: detectron2 keeps boxes in float32, and NMS wants scores of the same type.
    """
    monkeypatch.setattr(torch, "randperm", lambda n, device=None, **_: torch.arange(n, device=device))
    nms = proposal_utils.batched_nms
    monkeypatch.setattr(proposal_utils, "batched_nms", lambda boxes, scores, *args: nms(boxes, scores.float(), *args))


def one_step(cfg, model, batches, make=build_step):
    """The model's named parameters after one step of the trainer that `cfg` asks for."""
    trainer = make(cfg, model.train(), batches, build_optimizer(cfg, model))
    trainer.iter = 0
    trainer.run_step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("clip", [(), (*CLIP, 0.05), (*WHOLE, 0.05)], ids=["free", "each parameter", "whole model"])
def test_deepkd_with_equal_momenta_takes_the_step_of_plain_sgd(tiny_cfg, tiny_model, pinned, storage, clip):
    cfg = tiny_cfg(*DEEPKD, *EQUAL, "SOLVER.BASE_LR", 0.1, *clip)
    model = tiny_model(*DKD).double()
    twin = copy.deepcopy(model)
    ours = one_step(cfg, model, [make_batch()])
    plain = one_step(tiny_cfg(*DKD, "SOLVER.BASE_LR", 0.1, *clip), twin, [make_batch()])
    for name, p in plain.items():
        assert_close(ours[name], p, rtol=0, atol=1e-10)


def test_rpn_and_box_regressor_decay_under_deepkd_and_norms_do_not(tiny_cfg, tiny_model, pinned, storage):
    model = tiny_model(*DKD).double()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(model)
    decayed = one_step(tiny_cfg(*DEEPKD, "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.01), model, [make_batch()])
    free = one_step(tiny_cfg(*DEEPKD, "SOLVER.BASE_LR", 0.1, "SOLVER.WEIGHT_DECAY", 0.0), twin, [make_batch()])
    assert any("proposal_generator" in name for name in start) and any("bbox_pred" in name for name in start)
    for name, before in start.items():
        factor = 0.0 if ".norm." in name else 0.1 * 0.01
        assert_close(decayed[name] - free[name], -factor * before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [(), (*CLIP, 0.05), (*WHOLE, 0.5)], ids=["free", "each parameter", "whole model"])
@pytest.mark.parametrize("optimizer", ["deepkd_sgd", "sgd"])
def test_two_micro_batches_of_four_are_one_batch_of_eight(tiny_cfg, tiny_model, pinned, storage, optimizer, clip):
    options = (*DKD, "MODEL.RESNETS.NORM", "FrozenBN", "SOLVER.OPTIMIZER", optimizer, *clip)  # BN sees its batch only
    model = tiny_model(*options).double()
    twin = copy.deepcopy(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = make_batch(8)
    whole = one_step(tiny_cfg(*options), model, [images])
    rois = storage.latest()["roi_head/num_fg_samples"][0] + storage.latest()["roi_head/num_bg_samples"][0]
    parts = one_step(tiny_cfg(*options, "SOLVER.ACCUMULATE_STEPS", 2), twin, [images[:4], images[4:]])
    assert rois == storage.latest()["roi_head/num_fg_samples"][0] + storage.latest()["roi_head/num_bg_samples"][0]
    assert any(not torch.equal(p, start[name]) for name, p in whole.items())
    for name, p in whole.items():
        assert_close(parts[name], p, rtol=0, atol=1e-10)


def test_an_infinite_scaled_gradient_skips_the_step_of_every_stream(tiny_cfg, tiny_model, storage):
    cfg = tiny_cfg(*DEEPKD, "SOLVER.AMP.ENABLED", True)
    model = tiny_model(*DKD).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = build_step(cfg, model, [make_batch()] * 2, build_optimizer(cfg, model))
    trainer.iter = 0
    trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)  # beyond float16
    trainer.run_step()
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert trainer.train_step.scaler.get_scale() == 2.0**119
    trainer.train_step.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    trainer.run_step()
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, start[name])]
    assert "roi_heads.box_predictor.cls_score.weight" in moved and "proposal_generator.rpn_head.conv.weight" in moved


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["deepkd_sgd", "sgd"])
def test_mixed_precision_pools_and_distils_in_float32(tiny_cfg, tiny_model, storage, dtype, optimizer):
    cfg = tiny_cfg(*DKD, "SOLVER.OPTIMIZER", optimizer, "SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", dtype)
    model = tiny_model(*DKD)
    model.load_teacher()
    seen = {}
    trainer = build_step(cfg, model, [make_batch()], build_optimizer(cfg, model))
    for name, detector in {"student": model, "teacher": model.teacher.model}.items():
        heads, backbone = detector.roi_heads, detector.backbone
        heads.box_pooler.register_forward_hook(
            lambda _, inputs, out, name=name: seen.update(
                {f"{name} maps": inputs[0][0].dtype, f"{name} boxes": out.dtype}
            )
        )
        backbone.register_forward_hook(lambda _, __, out, name=name: seen.update({f"{name} backbone": out["p2"].dtype}))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.iter = 0
    trainer.run_step()
    assert len(seen) == 6
    for name, found in seen.items():
        assert found is (getattr(torch, dtype) if name.endswith("backbone") else torch.float32), name
    assert all(p.isfinite().all() for p in model.parameters())
    assert trainer.scaler.is_enabled() == (dtype == "float16")
    if dtype == "bfloat16":  # float16's first scale may skip the step
        assert any(not torch.equal(p, start[name]) for name, p in model.named_parameters())
    assert storage.latest()["loss_kd_nckd"][0] >= 0


@pytest.mark.parametrize("optimizer", [DEEPKD, DKD], ids=["deepkd_sgd", "sgd"])
def test_the_norm_of_the_whole_gradient_is_clipped(tiny_cfg, tiny_model, storage, optimizer):
    cfg = tiny_cfg(*optimizer, *WHOLE, 0.01)
    model = tiny_model(*DKD)
    one_step(cfg, model, [make_batch()])
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_norm_clips_every_parameter_by_itself_as_detectron2_does(tiny_cfg, tiny_model, storage):
    model = tiny_model(*DKD)
    one_step(tiny_cfg(*DEEPKD, *CLIP, 0.01), model, [make_batch()])
    norms = [p.grad.norm().item() for p in model.parameters() if p.grad is not None]
    assert max(norms) == pytest.approx(0.01, rel=1e-3) and sum(norm > 0.0099 for norm in norms) > 3


def test_detection_losses_are_the_tasks_and_the_stages_of_a_cascade_share_the_terms_stream():
    names = ("loss_cls_stage0", "loss_kd_tckd_stage0", "loss_kd_tckd_stage1", "loss_kd_within_top", "loss_rpn")
    tensors = {name: torch.tensor(2.0**i) for i, name in enumerate(names)}
    streams = {"tckd": "tcg", "within_top": "ncg"}
    assert stream_losses(tensors, streams) == {"tog": 17, "tcg": 6, "ncg": 8}
    with pytest.raises(ValueError, match="loss_kd_mass belongs to no stream: the terms of the loss are tckd"):
        stream_losses({"loss_kd_mass": torch.tensor(0.0)}, streams)


def test_foreground_and_background_terms_have_streams(tiny_cfg, tiny_model, storage):
    gdkds = ("KD.LOSS.NAME", "gdkds", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd")
    model = tiny_model(*gdkds)
    one_step(tiny_cfg(*gdkds), model, [make_batch()])
    kd = {name for name in storage.latest() if name.startswith("loss_kd_")}
    assert kd == {f"loss_kd_{term}" for term in model.loss.streams} and {"loss_kd_fg_mass", "loss_kd_bg_tckd"} <= kd


def test_plain_sgd_keeps_detectron2s_own_step(tiny_cfg, tiny_model):
    cfg, model = tiny_cfg(*DKD), tiny_model(*DKD)
    assert type(build_step(cfg, model, [], build_optimizer(cfg, model))) is SimpleTrainer
    cfg.SOLVER.ACCUMULATE_STEPS = 2
    assert type(build_step(cfg, model, [], build_optimizer(cfg, model))) is StreamTrainer


def test_momenta_are_set_from_the_measured_gsnr(tiny_cfg, tiny_model, storage):
    window = ("SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 3)
    cfg, model = tiny_cfg(*DEEPKD, *window), tiny_model(*DKD)
    trainer = build_step(cfg, model, [make_batch(seed=i) for i in range(4)], build_optimizer(cfg, model))
    for trainer.iter in range(4):
        trainer.run_step()
    chosen = trainer.auto_momenta.momenta
    assert set(chosen) == {"tog", "tcg", "ncg"} and trainer.optimizer.param_groups[0]["momenta"] == chosen
    resumed = build_step(cfg, model, [], build_optimizer(cfg, model))
    resumed.load_state_dict(trainer.state_dict())
    assert resumed.auto_momenta.momenta == chosen == resumed.optimizer.param_groups[0]["momenta"]


TRAINING = (
    "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.BASE_LR", 0.005,
    "SOLVER.ACCUMULATE_STEPS", 2, "SOLVER.AMP.ENABLED", True, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip
AUTO = ("SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 2, "SOLVER.GSNR.WINDOW", 4)


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_resumed_run_with_streams_scaler_and_momenta_ends_as_an_undisturbed_one(tiny_cfg, tmp_path, precision):
    cfg = tiny_cfg(*DEEPKD, *TRAINING, *AUTO, "SOLVER.AMP.DTYPE", precision)
    (tmp_path / "output").mkdir()
    whole = train(cfg, resume=False)
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000002.pth")
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3 and resumed.loader.start == 6
    expected, ours = (trainer._trainer.state_dict() for trainer in (whole, resumed))
    assert_equal_trees(expected, ours)
    weights = resumed._trainer.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in whole._trainer.model.state_dict().items())


def train(cfg, resume):
    seed_all_rng(1)  # as detectron2's default_setup does
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def assert_equal_trees(expected, ours):
    """Nested dicts and lists that hold the same tensors and values."""
    assert type(expected) is type(ours)
    if isinstance(expected, dict):
        assert list(expected) == list(ours)
        [assert_equal_trees(expected[key], ours[key]) for key in expected]
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(ours)
        [assert_equal_trees(a, b) for a, b in zip(expected, ours, strict=True)]
    else:
        assert torch.equal(expected, ours) if isinstance(expected, torch.Tensor) else expected == ours
