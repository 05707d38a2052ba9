# A ViTDet of depth 4 and width 64 for images of 256 px: detectron2's own config of the ViT-B, made small, without its
# mask head (the digits have no masks). To see on a CPU that a LazyConfig trains and then teaches: docs/distill.md.
#   DETECTRON2=a/checkout/of/its/main tools/lazyconfig_train_net.py --config-file configs/LazyDigits/vitdet_tiny.py
import os

from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

SIZE, WIDTH = 256, 64
DETECTRON2 = os.getenv("DETECTRON2", "detectron2")
vitdet_b = LazyConfig.load(f"{DETECTRON2}/projects/ViTDet/configs/COCO/mask_rcnn_vitdet_b_100ep.py")
model, dataloader, optimizer, train = vitdet_b.model, vitdet_b.dataloader, vitdet_b.optimizer, vitdet_b.train
lr_multiplier = vitdet_b.lr_multiplier

model.backbone.net.update(
    img_size=SIZE, embed_dim=WIDTH, depth=4, num_heads=2, drop_path_rate=0.0, window_size=8, window_block_indexes=[0, 2]
)
model.backbone.update(out_channels=WIDTH, square_pad=SIZE)
model.proposal_generator.head.in_channels = WIDTH
model.roi_heads.update(num_classes=10, batch_size_per_image=128, mask_in_features=None, mask_pooler=None)
model.roi_heads.mask_head = None
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=WIDTH, height=7, width=7), conv_dims=[WIDTH, WIDTH], fc_dims=[128]
)
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=128)

dataloader.train.dataset.names, dataloader.test.dataset.names = "digits_train", "digits_val"
dataloader.train.mapper.update(recompute_boxes=False, use_instance_mask=False)
flip, scale, crop = dataloader.train.mapper.augmentations
scale.update(min_scale=0.8, max_scale=1.25, target_height=SIZE, target_width=SIZE)
crop.crop_size = (SIZE, SIZE)
flip.prob = 0.0  # a mirrored digit is another sign
dataloader.test.mapper.augmentations[0].update(short_edge_length=SIZE, max_size=SIZE)
dataloader.train.update(total_batch_size=8, num_workers=0)
dataloader.test.num_workers = 0

optimizer.lr = 1e-3
optimizer.params.lr_factor_func = None  # it is for a pretrained ViT
lr_multiplier.update(warmup_length=0.05)
train.update(init_checkpoint="", max_iter=400, eval_period=400, output_dir="output/digits/vitdet_tiny", seed=1)
train.amp.enabled = False
train.checkpointer.period = 100
