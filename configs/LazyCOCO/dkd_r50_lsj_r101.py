# DKD (arXiv 2203.08679), ResNet-50 from detectron2's R101-FPN of 400 epochs. α 1, β 0.25, T 1, no warm-up (DKD's
# released code). The pair is ours: no result is published.
#   tools/lazyconfig_train_net.py --config-file configs/LazyCOCO/dkd_r50_lsj_r101.py --num-gpus 8
from .common import coco, lr_multiplier, lsj_r101, resnet50_student, sgd, train

model = resnet50_student()
model.teacher = lsj_r101()
dataloader = coco("BGR")
optimizer = sgd()
train.update(
    output_dir="output/coco/dkd_r50_lsj_r101", init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl"
)
