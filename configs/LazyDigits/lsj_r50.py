# detectron2's own Mask R-CNN R50 LSJ baseline for images of 128 px: narrow FPN and heads, no mask head (the digits
# have no masks). Any detectron2 has it. To see on a CPU that it trains and then teaches: docs/distill.md.
#   tools/lazyconfig_train_net.py --config-file configs/LazyDigits/lsj_r50.py --num-gpus 0
from detectron2 import model_zoo
from detectron2.layers import ShapeSpec

SIZE, WIDTH = 128, 64
lsj = model_zoo.get_config("new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")
model, dataloader, optimizer, train = lsj.model, lsj.dataloader, lsj.optimizer, lsj.train
lr_multiplier = lsj.lr_multiplier

backbone = model.backbone
backbone.bottom_up.stem.norm = backbone.bottom_up.stages.norm = backbone.norm = "BN"  # SyncBN needs a GPU
backbone.out_channels = model.proposal_generator.head.in_channels = WIDTH
model.proposal_generator.anchor_generator.sizes = [[12], [24], [48], [96], [128]]
model.roi_heads.update(num_classes=10, batch_size_per_image=128, mask_in_features=None, mask_pooler=None)
model.roi_heads.mask_head = None
model.roi_heads.box_head.update(
    input_shape=ShapeSpec(channels=WIDTH, height=7, width=7), conv_dims=[WIDTH], fc_dims=[128]
)
model.roi_heads.box_predictor.input_shape = ShapeSpec(channels=128)

dataloader.train.dataset.names, dataloader.test.dataset.names = "digits_train", "digits_val"
dataloader.train.mapper.update(recompute_boxes=False, use_instance_mask=False)
scale, crop, flip = dataloader.train.mapper.augmentations
scale.update(min_scale=0.8, max_scale=1.25, target_height=SIZE, target_width=SIZE)
crop.crop_size = (SIZE, SIZE)
flip.prob = 0.0  # a mirrored digit is another sign
dataloader.test.mapper.augmentations[0].update(short_edge_length=SIZE, max_size=SIZE)
dataloader.train.update(total_batch_size=4, num_workers=0)
dataloader.test.num_workers = 0

optimizer.lr = 0.01
lr_multiplier.update(warmup_length=0.2)
train.update(init_checkpoint="", max_iter=300, eval_period=300, output_dir="output/digits/lsj_r50", seed=1)
train.amp.enabled = False
train.checkpointer.period = 100
