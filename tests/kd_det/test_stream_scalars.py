"""The scalars of the streams, and the best checkpoint."""

import json

import pytest
import torch

from kd_det.engine import DistillationTrainer
from kd_det.hooks import KeepBest

TRAINING = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "KD.LOSS.TOPK.ENABLED", True, "SOLVER.OPTIMIZER", "deepkd_sgd",
    "SOLVER.AMP.ENABLED", True, "SOLVER.BASE_LR", 0.001, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 20, "SEED", 1,
    "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "DATALOADER.NUM_WORKERS", 0,
)  # fmt: skip


@pytest.fixture
def trainer(tiny_cfg, tmp_path):
    (tmp_path / "output").mkdir()
    return DistillationTrainer(tiny_cfg(*TRAINING))


def test_norms_momenta_k_and_scale_are_written_every_twenty_iterations(trainer, tmp_path):
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "output" / "metrics.json").read_text().splitlines())
    assert line["grad_norm/tog+ncg"] > 0 and line["grad_norm/tcg"] > 0
    assert line["momentum/tog"] == pytest.approx(0.975) and line["momentum/tcg"] == pytest.approx(0.825)
    assert line["topk/K"] == 10  # 19 of 20 iterations: all of the ten non-target classes but for the ramp's end
    assert line["loss_scale"] >= 1


def test_the_best_weights_are_kept_and_a_resumed_run_knows_how_good_they_were(trainer, tmp_path):
    path = tmp_path / "output" / "model_best.pth"
    hook = KeepBest(path, trainer.checkpointer.model)
    hook.trainer = trainer
    hook.before_train()
    kept = []
    for trainer.iter, ap in enumerate([1.0, float("nan"), 3.0, 2.0]):
        trainer._last_eval_results = {"bbox": {"AP": ap}}
        hook.after_step()
        hook.after_step()  # no new evaluation
        kept.append(torch.load(path, weights_only=True)["iteration"])
    assert kept == [0, 0, 2, 2]
    assert not (tmp_path / "output" / "last_checkpoint").exists()
    trainer.start_iter = 3
    resumed = KeepBest(path, trainer.checkpointer.model)
    resumed.trainer = trainer
    resumed.before_train()
    assert resumed.best == 3.0
