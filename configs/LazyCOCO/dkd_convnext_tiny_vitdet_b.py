# DKD (arXiv 2203.08679), ConvNeXt-T from ViTDet-B. α 1, β 0.25, T 1, no warm-up (DKD's released code). The pair and its
# AdamW are ours: no result is published.
#   DETECTRON2=a/checkout/of/its/main tools/lazyconfig_train_net.py \
#       --config-file configs/LazyCOCO/dkd_convnext_tiny_vitdet_b.py --num-gpus 8
from .common import adamw, coco, convnext_tiny_student, lr_multiplier, train, vitdet_b

model = convnext_tiny_student()
model.teacher = vitdet_b()
dataloader = coco("RGB")
optimizer = adamw()
train.update(output_dir="output/coco/dkd_convnext_tiny_vitdet_b", init_checkpoint="")
train.clip = {"max_norm": 1.0}
