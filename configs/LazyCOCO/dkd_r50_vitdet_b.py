# DKD (arXiv 2203.08679), ResNet-50 from ViTDet-B. α 1, β 0.25, T 1, no warm-up (DKD's released code). The pair is ours:
# no result is published.
#   DETECTRON2=a/checkout/of/its/main tools/lazyconfig_train_net.py \
#       --config-file configs/LazyCOCO/dkd_r50_vitdet_b.py --num-gpus 8
from .common import coco, lr_multiplier, resnet50_student, sgd, train, vitdet_b

model = resnet50_student()
model.teacher = vitdet_b()
dataloader = coco("BGR")
optimizer = sgd()
train.update(
    output_dir="output/coco/dkd_r50_vitdet_b", init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl"
)
