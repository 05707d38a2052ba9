"""DistilledRCNN under detectron2's own DefaultTrainer, which knows nothing of distillation."""

import torch
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng

SMALL = (
    "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.RANDOM_FLIP", "none",
    "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 5, "SOLVER.BASE_LR", 0.01, "DATALOADER.NUM_WORKERS", 0, "SEED", 3,
)  # fmt: skip


def train(cfg, tmp_path, name):
    """Losses of every step and the weights after the last, from the same seed."""
    cfg.OUTPUT_DIR = str(tmp_path / name)
    (tmp_path / name).mkdir()
    seed_all_rng(3)
    trainer = DefaultTrainer(cfg)
    model, losses = trainer.model, []
    model.register_forward_hook(lambda _, __, out: losses.append({k: v.detach().clone() for k, v in out.items()}))
    trainer.train()
    return losses, {k: v.clone() for k, v in model.state_dict().items()}


def test_without_a_loss_five_steps_are_those_of_generalized_rcnn_to_the_bit(tiny_cfg, tmp_path):
    plain_losses, plain = train(tiny_cfg(*SMALL, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"), tmp_path, "plain")
    losses, ours = train(tiny_cfg(*SMALL, "KD.LOSS.NAME", "none"), tmp_path, "ours")
    assert len(losses) == 5
    assert all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(plain_losses, losses, strict=True)
    )
    assert plain.keys() == ours.keys() and all(torch.equal(plain[k], ours[k]) for k in plain)


def test_it_trains_with_dkd_as_it_is(tiny_cfg, tmp_path):
    losses, weights = train(tiny_cfg(*SMALL, "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0), tmp_path, "dkd")
    assert all({"loss_kd_tckd", "loss_kd_nckd", "loss_cls"} <= set(step) for step in losses)
    assert all(torch.isfinite(v).all() for v in weights.values() if v.is_floating_point())


def test_a_distillation_weight_of_zero_is_plain_training(tiny_cfg, tmp_path):
    _, plain = train(tiny_cfg(*SMALL, "KD.LOSS.NAME", "none"), tmp_path, "none")
    zero = ("KD.LOSS.NAME", "dkd", "KD.LOSS.DKD.ALPHA", 0.0, "KD.LOSS.DKD.BETA", 0.0)
    losses, ours = train(tiny_cfg(*SMALL, *zero), tmp_path, "zero")
    assert all(step["loss_kd_tckd"] == 0 and step["loss_kd_nckd"] == 0 for step in losses)
    assert all(torch.equal(plain[k], ours[k]) for k in plain)
