"""Two gloo processes: equal parameters, and the gradient of one process. One test starts them by torchrun itself."""

import os
import re

import pytest
import torch
from torch.testing import assert_close

from helpers import HELPERS, forked
from helpers.few_digits import few_digits
from helpers.tiny_detector import make_batch, write_training
from helpers.two_ranks import gradients


@pytest.fixture
def unpinned(monkeypatch):
    """What `gradients` pins is put back after the test."""
    from detectron2.modeling.proposal_generator import proposal_utils

    monkeypatch.setattr(torch, "randperm", torch.randperm)
    monkeypatch.setattr(proposal_utils, "batched_nms", proposal_utils.batched_nms)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
DEEPKD = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.005,
    "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)", "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip


def on_two_ranks(*command):
    """Run a script in two gloo processes of one thread each; a hang is an error too."""
    for done in forked.run_ranks(2, command, timeout=400):
        assert done.returncode == 0, done.stderr[-3000:]


def test_two_ranks_share_parameters_and_statistics_and_step_by_one_process_gradient(tiny_cfg, tmp_path, unpinned):
    configs = {}
    for name, options in {"own": (), "both": ("KD.ROWS", "foreground", "KD.PROPOSALS", "student+teacher")}.items():
        folder = tmp_path / name
        configs[folder] = tiny_cfg(
            *DEEPKD, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "DATASETS.TRAIN", "('digits_train',)",
            "SOLVER.EMA.ENABLED", True, "OUTPUT_DIR", folder / "output", *options,
        )  # fmt: skip
        (folder / "output").mkdir(parents=True)
        (folder / "config.yaml").write_text(configs[folder].dump())
    on_two_ranks(HELPERS / "two_ranks.py", *configs)
    for folder, cfg in configs.items():
        check_ranks(folder, cfg)


def check_ranks(folder, cfg):
    """What two_ranks.py has left of a config."""
    first, second = (torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1))
    for trained in ("model", "synchronised"):
        assert any("running_var" in name for name in first[trained])
        assert all(torch.equal(value, second[trained][name]) for name, value in first[trained].items())

    for norms, own in ((first["norms"], 1.0), (second["norms"], 2.0)):
        assert norms["trained.running_mean"].eq(1.5).all() and norms["trained.running_var"].eq(1.5).all()
        assert norms["frozen.running_mean"].eq(own).all() and norms["frozen.running_var"].eq(own).all()
    assert first["disagreement"] == second["disagreement"]
    assert "After 8 iterations, the parameters of rank 1 differ from those of rank 0" in first["disagreement"]

    cfg.SOLVER.EMA.ENABLED = False
    alone = gradients(cfg, make_batch(8))
    assert alone.keys() == first["gradients"].keys()
    for name, gradient in alone.items():
        assert torch.equal(first["gradients"][name], second["gradients"][name])
        assert_close(first["gradients"][name], gradient, rtol=0, atol=1e-10)


def test_train_net_under_torchrun_keeps_two_ranks_equal_to_the_bit_though_batches_have_no_object(tiny_cfg, tmp_path):
    cfg = tiny_cfg(
        *DEEPKD, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 12, "SOLVER.STEPS", "(8,)", "KD.LOSS.TOPK.ENABLED",
        True, "SOLVER.CHECKPOINT_PERIOD", 4, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False,
    )  # fmt: skip
    entry = few_digits(tmp_path, 8, empty=(0, 2, 3, 5, 6), split="digits_train")
    cfg.DATASETS.REGISTER, cfg.DATASETS.TRAIN = [entry], (entry[0],)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = forked.run([*TORCHRUN, "tools/train_net.py", "--config-file", config, "--num-gpus", 0], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [(tmp_path / "output" / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    digests = [re.findall(r"Parameters after (\d+) iterations on rank \d: ([0-9a-f]{64})", log) for log in logs]
    assert [int(iterations) for iterations, _ in digests[0]] == [4, 8, 12] and digests[0] == digests[1]
    assert len({digest for _, digest in digests[0]}) == 3


def test_two_ranks_of_every_architecture_keep_equal_weights_and_resume_to_the_bit(tmp_path):
    configs = []
    for architecture in ("retinanet", "segmentation", "panoptic"):
        output = tmp_path / architecture / "output"
        output.mkdir(parents=True)
        schedule = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.CHECKPOINT_PERIOD", 2)
        words = (*DEEPKD, *schedule, "SOLVER.IMS_PER_BATCH", 4, "OUTPUT_DIR", output)
        configs.append(write_training(output.parent, architecture, *words))
    on_two_ranks(HELPERS / "resume_ranks.py", *configs)
    for config in configs:
        digests = {(config.parent / "output" / f"digests.rank{rank}").read_text() for rank in (0, 1)}
        assert len(digests) == 1 and len(set(digests.pop().split())) == 1, config
    last = torch.load(tmp_path / "panoptic" / "output" / "model_final.pth", weights_only=True)
    assert any("fusion" in name for name in last["trainer"]["feature_loss"]), "the digests are of the fusion, too"
