# DKD (arXiv 2203.08679), ConvNeXt-T from detectron2's R101-FPN of 400 epochs. α 1, β 0.25, T 1, no warm-up (DKD's
# released code). The pair and its AdamW are ours: no result is published.
#   tools/lazyconfig_train_net.py --config-file configs/LazyCOCO/dkd_convnext_tiny_lsj_r101.py --num-gpus 8
from .common import adamw, coco, convnext_tiny_student, lr_multiplier, lsj_r101, train

model = convnext_tiny_student()
model.teacher = lsj_r101()
dataloader = coco("RGB")
optimizer = adamw()
train.update(output_dir="output/coco/dkd_convnext_tiny_lsj_r101", init_checkpoint="")
train.clip = {"max_norm": 1.0}
