"""What the students of this folder share: Faster R-CNN FPN on COCO, batches of 8, 180k iterations (DKD's code).

Learning rate: the paper's, 0.01 for 8 images, under SGD with momentum 0.9. Of the teachers,
Mask R-CNNs, the box head teaches.
"""

import os

import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from kd_core.losses import DKDLoss
from kd_det import DistilledRCNN, Teacher
from kd_det.modeling.backbone import timm_bottom_up

# A checkout of detectron2's main branch, for configs of its projects/. Its detectron2 must also be the one that runs.
DETECTRON2 = os.getenv("DETECTRON2", "detectron2")
IMAGENET_MEAN, IMAGENET_STD = [123.675, 116.280, 103.530], [58.395, 57.120, 57.375]  # RGB


def student(mean, std, image_format):
    """A DistilledRCNN without a mask head, taught by DKD: α 1, β 0.25, T 1, no warm-up (DKD's released code)."""
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    for part in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(part)
    model.pixel_mean, model.pixel_std, model.input_format = mean, std, image_format
    model._target_ = DistilledRCNN
    model.loss = L(DKDLoss)(alpha=1.0, beta=0.25, temperature=1.0)
    model.max_iter = "${train.max_iter}"
    return model


def resnet18_student():
    """The pixels are torchvision's; `tools/convert_weights.py torchvision:resnet18` makes the weights."""
    model = student(IMAGENET_MEAN, IMAGENET_STD, "RGB")
    model.backbone.bottom_up.stages.depth = 18
    model.backbone.bottom_up.stages.pop("stride_in_1x1")  # basic blocks have no 1×1 convolution
    model.backbone.bottom_up.freeze_at = 2
    return model


def resnet50_student():
    """Pixels and weights are MSRA's, as in detectron2's own baselines."""
    model = student([103.530, 116.280, 123.675], [1.0, 1.0, 1.0], "BGR")
    model.backbone.bottom_up.freeze_at = 2
    return model


def convnext_tiny_student():
    """Weights are timm's, downloaded when training starts; on a machine without internet access give
    model.backbone.bottom_up.weights=FILE model.backbone.bottom_up.pretrained=False.
    """
    model = student(IMAGENET_MEAN, IMAGENET_STD, "RGB")
    model.backbone.bottom_up = L(timm_bottom_up)(
        name="convnext_tiny.fb_in1k", pretrained=True, weights="", kwargs={"drop_path_rate": 0.1}
    )
    model.backbone.in_features = ["res2", "res3", "res4", "res5"]
    model.backbone.norm = "GN"  # its maps are not normalised
    return model


def teacher(config_file, weights):
    """A teacher of the student's classes; it keeps its own channel order, mean, std and square padding."""
    return L(Teacher.from_files)(
        config_file=config_file,
        weights=weights,
        overrides=[],
        num_classes="${..roi_heads.num_classes}",
        input_format="${..input_format}",
        allow_random=False,
    )


def vitdet_b():
    """detectron2's ViTDet Mask R-CNN with a ViT-B: box AP 51.6 on COCO val2017 (projects/ViTDet/README.md)."""
    return teacher(
        f"{DETECTRON2}/projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py",
        "https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/mask_rcnn_vitdet_b/f325346929/model_final_61ccd1.pkl",
    )


def lsj_r101():
    """detectron2's Mask R-CNN R101-FPN of 400 epochs of large-scale jitter: box AP 48.9 on val2017 (MODEL_ZOO.md)."""
    return teacher(
        "new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ.py",
        "https://dl.fbaipublicfiles.com/detectron2/new_baselines/mask_rcnn_R_101_FPN_400ep_LSJ/42073830/"
        "model_final_f96b26.pkl",
    )


def coco(image_format):
    """detectron2's COCO data, for batches of 8 images in this channel order."""
    dataloader = model_zoo.get_config("common/data/coco.py").dataloader
    dataloader.train.total_batch_size = 8
    dataloader.train.mapper.update(image_format=image_format, use_instance_mask=False)
    return dataloader


def sgd():
    """DKD's optimizer."""
    return L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.01, momentum=0.9, weight_decay=1e-4
    )


def adamw():
    """Of the ConvNeXt students (ours)."""
    return L(torch.optim.AdamW)(
        params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
    )


train = model_zoo.get_config("common/train.py").train
train.update(max_iter=180000, eval_period=20000, seed=-1)  # 12 ep = 180k iterations · 8 images / 118k images

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1, 0.01], milestones=[120000, 160000, 180000]),
    warmup_length=1000 / 180000,
    warmup_factor=0.001,
)
