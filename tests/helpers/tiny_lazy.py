"""A LazyConfig that trains: DeepKD on the digits, student and teacher of the same tiny kind."""

from pathlib import Path

import detectron2.data.transforms as T
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from kd_core.losses import DKDLoss
from kd_core.optim import deepkd_sgd
from kd_det import DistilledRCNN, Teacher

from .tiny_lazy_teacher import model

model._target_ = DistilledRCNN
model.loss = L(DKDLoss)(beta=0.25, temperature=1.0)
model.max_iter = "${train.max_iter}"
model.teacher = L(Teacher.from_files)(
    config_file=str(Path(__file__).with_name("tiny_lazy_teacher.py")),
    overrides=["model.roi_heads.box_head.fc_dims=[32,16]"],
    num_classes="${..roi_heads.num_classes}",
    input_format="${..input_format}",
    allow_random=True,
)

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
for split in ("train", "test"):
    dataloader[split].dataset.names = f"digits_{split}".replace("test", "val")
    dataloader[split].num_workers = 0
    dataloader[split].mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=64, max_size=64)]
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.augmentations.append(L(T.RandomFlip)())
dataloader.train.total_batch_size = 2

optimizer = L(deepkd_sgd)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.005, momentum=0.9, weight_decay=1e-4
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[5, 6]), warmup_length=1 / 3, warmup_factor=0.1
)
train = model_zoo.get_config("common/train.py").train
train.update(init_checkpoint="", max_iter=6, seed=1, eval_period=0, accumulate_steps=1)
train.checkpointer.period = 2
train.ema = {"enabled": True, "decay": 0.9}
