# DKD (arXiv 2203.08679), ResNet-18 from detectron2's R101-FPN of 400 epochs. α 1, β 0.25, T 1, no warm-up (DKD's
# released code). The pair is ours: no result is published. The teacher's config comes with
# every detectron2 from 0.5 on.
#   tools/convert_weights.py torchvision:resnet18 --output pretrained/r18.pth
#   tools/lazyconfig_train_net.py --config-file configs/LazyCOCO/dkd_r18_lsj_r101.py --num-gpus 8
from .common import coco, lr_multiplier, lsj_r101, resnet18_student, sgd, train

model = resnet18_student()
model.teacher = lsj_r101()
dataloader = coco("RGB")
optimizer = sgd()
train.update(output_dir="output/coco/dkd_r18_lsj_r101", init_checkpoint="pretrained/r18.pth")
