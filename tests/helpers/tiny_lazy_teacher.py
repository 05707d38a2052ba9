"""A LazyConfig of nothing but a model: a Faster R-CNN with FPN of a few thousand weights, for the ten digits."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    model.roi_heads.pop(part)
model.backbone.out_channels = 8
model.backbone.bottom_up = L(ResNet)(
    stem=L(BasicStem)(in_channels=3, out_channels=8, norm="BN"),
    stages=[
        L(ResNet.make_stage)(
            block_class=BasicBlock,
            num_blocks=1,
            stride_per_block=[stride],
            in_channels=before,
            out_channels=after,
            norm="BN",
        )
        for stride, before, after in ((1, 8, 8), (2, 8, 12), (2, 12, 16), (2, 16, 24))
    ],
    out_features=["res2", "res3", "res4", "res5"],
)
model.proposal_generator.update(pre_nms_topk=(50, 50), post_nms_topk=(50, 50), batch_size_per_image=32)
model.proposal_generator.head.in_channels = 8
model.proposal_generator.anchor_generator.sizes = [[8], [16], [32], [64], [128]]
model.roi_heads.update(num_classes=10, batch_size_per_image=16)
model.roi_heads.box_head.update(input_shape=ShapeSpec(channels=8, height=7, width=7), fc_dims=[16])
model.roi_heads.box_predictor.update(input_shape=ShapeSpec(channels=16), test_score_thresh=0.0)
