"""Run on two ranks by test_two_ranks.py: `two_ranks.py FOLDER …` leaves rank<r>.pth in each folder, of its config.yaml.

`model`: after three iterations of DeepKD, in the second of which rank 1 has no object; `synchronised`: the same, two
iterations with naiveSyncBN; `gradients`: of one float64 step on half of eight images; `norms`: statistics that differed
by rank, shared; `disagreement`: what is said where one rank's weights have drifted.
"""

import sys
from pathlib import Path

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from kd_det.compat import distribute
from kd_det.config import kd_defaults, merge_file
from kd_det.engine.hooks.ranks import check_ranks_agree, share_batch_norm
from kd_det.engine.launch import join_process_group
from kd_det.engine.train_step import build_step
from kd_det.engine.trainer import DistillationTrainer
from kd_det.solver import build_optimizer


def train(cfg):
    """The model after a few iterations on the digits."""
    trainer = DistillationTrainer(cfg)
    model = trainer.checkpointer.model

    def remove_objects(_, inputs):
        if trainer.iter == 1 and comm.get_rank() == 1:
            for item in inputs[0]:
                item["instances"] = item["instances"][:0]

    model.register_forward_pre_hook(remove_objects)
    trainer.train()
    return dict(model.state_dict())


def gradients(cfg, images):
    """The summed gradient of every parameter after one step on `images`, sampled in their order."""
    torch.randperm = lambda n, device=None, **_: torch.arange(n, device=device)
    nms = proposal_utils.batched_nms
    proposal_utils.batched_nms = lambda boxes, scores, *args: nms(boxes, scores.float(), *args)
    torch.manual_seed(0)
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    model = build_model(cfg).double().train()
    with EventStorage():
        trainer = build_step(cfg, distribute(model), [images], build_optimizer(cfg, model))
        trainer.iter = 0
        trainer.run_step()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def shared_norms(rank):
    """The statistics of a BatchNorm and of a frozen one, which were rank + 1, after they were shared."""
    model = nn.ModuleDict({"trained": nn.BatchNorm2d(3), "frozen": FrozenBatchNorm2d(3)})
    for norm in model.values():
        norm.running_mean.fill_(rank + 1)
        norm.running_var.fill_(rank + 1)
    share_batch_norm(model)
    return dict(model.named_buffers())


def disagreement(rank):
    """What `check_ranks_agree` says where rank 1's last weight is the next float."""
    model = nn.Linear(2, 2)
    for p in model.parameters():
        p.data.fill_(0.5)
    check_ranks_agree(model, 7)
    if rank == 1:
        model.bias.data[1] = torch.nextafter(model.bias.data[1], torch.tensor(1.0))
    try:
        check_ranks_agree(model, 8)
    except RuntimeError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    from tiny_detector import make_batch  # this folder is on a script's path

    join_process_group(0)
    rank, randperm, nms = comm.get_rank(), torch.randperm, proposal_utils.batched_nms
    for folder in map(Path, sys.argv[1:]):
        torch.randperm, proposal_utils.batched_nms = randperm, nms  # which `gradients` has pinned
        config = kd_defaults()
        merge_file(config, str(folder / "config.yaml"))
        torch.manual_seed(rank)  # DistributedDataParallel shall send rank 0's weights
        result = {"model": train(config), "norms": shared_norms(rank), "disagreement": disagreement(rank)}
        config.MODEL.RESNETS.NORM, config.SOLVER.MAX_ITER = "naiveSyncBN", 2
        result["synchronised"] = train(config)
        result["gradients"] = gradients(config, make_batch(8)[4 * rank : 4 * rank + 4])
        torch.save(result, folder / f"rank{rank}.pth")
