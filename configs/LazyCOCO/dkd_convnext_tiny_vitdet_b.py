# DKD (arXiv 2203.08679), ConvNeXt-T from ViTDet-B. α 1, β 0.25, T 1, no warm-up (DKD's released code). The pair and its
# AdamW are ours: no result is published. ImageNet weights are timm's, downloaded when training starts; on a machine
# without internet access give model.backbone.bottom_up.weights=FILE model.backbone.bottom_up.pretrained=False.
#   DETECTRON2=a/checkout/of/its/main tools/lazyconfig_train_net.py \
#       --config-file configs/LazyCOCO/dkd_convnext_tiny_vitdet_b.py --num-gpus 8
import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from kd_det.modeling.backbone import timm_bottom_up

from .common import IMAGENET_MEAN, IMAGENET_STD, coco, lr_multiplier, student, train, vitdet_b

model = student(IMAGENET_MEAN, IMAGENET_STD, "RGB")
model.backbone.bottom_up = L(timm_bottom_up)(
    name="convnext_tiny.fb_in1k", pretrained=True, weights="", kwargs={"drop_path_rate": 0.1}
)
model.backbone.in_features = ["res2", "res3", "res4", "res5"]
model.backbone.norm = "GN"  # its maps are not normalised
model.teacher = vitdet_b()
dataloader = coco("RGB")
optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05
)
train.update(output_dir="output/coco/dkd_convnext_tiny_vitdet_b", init_checkpoint="")
train.clip = {"max_norm": 1.0}
