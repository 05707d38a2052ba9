# DeepKD over DKD with the dynamic top-k mask (arXiv 2505.15133), ResNet-18 from ViTDet-B. The pair is ours: no result
# is published. Learning rate: DKD's, 0.01 for 8 images, found for momentum 0.9. Δ 0.075 is the paper's; step "matched"
# and the rest are as in configs/COCO/deepkd_r18_r101.yaml.
#   tools/convert_weights.py torchvision:resnet18 --output pretrained/r18.pth
#   DETECTRON2=a/checkout/of/its/main tools/lazyconfig_train_net.py \
#       --config-file configs/LazyCOCO/deepkd_r18_vitdet_b.py --num-gpus 8
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from kd_core.optim import deepkd_sgd
from kd_core.topk import TopKSchedule

from .common import coco, lr_multiplier, resnet18_student, train, vitdet_b

model = resnet18_student()
model.teacher = vitdet_b()
model.loss.topk = L(TopKSchedule)()
dataloader = coco("RGB")
optimizer = L(deepkd_sgd)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.01,
    momentum=0.9,
    delta_tog=0.075,
    delta_tcg=-0.075,
    delta_ncg=0.075,
    weight_decay=1e-4,
    step="matched",
)
train.update(output_dir="output/coco/deepkd_r18_vitdet_b", init_checkpoint="pretrained/r18.pth")
