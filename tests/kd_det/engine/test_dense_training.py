"""Trainings of a DistilledRetinaNet: streams, mixed precision, micro-batches, resuming, two processes."""

import re
import shutil

import pytest
import torch
from detectron2.utils.env import seed_all_rng

from helpers.tiny_detector import RETINANET
from kd_det.engine.trainer import DistillationTrainer

from .test_stream_trainer import assert_equal_trees
from .test_two_ranks import on_two_ranks

TRAINING = (
    *RETINANET, "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd",
    "SOLVER.BASE_LR", 0.002, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2,
    "SOLVER.STEPS", "(3,)", "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip


@pytest.fixture
def cfg(tiny_cfg, retinanet, tmp_path):
    (tmp_path / "output").mkdir()
    return tiny_cfg(*TRAINING)


def train(cfg, resume=False):
    seed_all_rng(1)  # as detectron2's default_setup does
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_with_streams_bfloat16_and_micro_batches_a_resumed_run_ends_to_the_bit_as_an_undisturbed_one(cfg, tmp_path):
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE, cfg.SOLVER.ACCUMULATE_STEPS = True, "bfloat16", 2
    cfg.SOLVER.EMA.ENABLED = True
    undisturbed = train(cfg)
    cfg.OUTPUT_DIR = str(shutil.copytree(tmp_path / "output", tmp_path / "resumed"))
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000001.pth")
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2 and set(undisturbed._trainer.streams.values()) == {"tcg", "ncg"}
    saved, ours = (
        torch.load(tmp_path / folder / "model_final.pth", weights_only=True) for folder in ("output", "resumed")
    )
    assert saved["trainer"]["loss_normalizer"] != 100  # as in a new RetinaNet
    assert_equal_trees(saved, ours)


def test_two_ranks_keep_equal_weights_and_resume_to_the_bit(cfg, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    command = ("tools/train_net.py", "--config-file", config, "--num-gpus", 0)
    on_two_ranks(*command)
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    on_two_ranks(*command, "--resume")
    logs = [(tmp_path / "output" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    digests = [re.findall(r"Parameters after (\d+) iterations on rank \d: ([0-9a-f]{64})", log) for log in logs]
    assert [int(iterations) for iterations, _ in digests[0]] == [2, 4, 4] and digests[0] == digests[1]
    assert digests[0][1] == digests[0][2] != digests[0][0]
