"""A real Faster R-CNN with FPN of a few thousand weights, and batches of 64 px for it."""

from pathlib import Path

import torch
from detectron2.structures import BitMasks, Boxes, Instances

from kd_det.config import kd_defaults, merge_list

TINY = {
    "REPORT.ENABLED": False,  # of the tests' many trainings; those of the report turn it on
    "MODEL.DEVICE": "cpu",
    "MODEL.META_ARCHITECTURE": "DistilledRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.NORM": "BN",  # frozen statistics of random layers would diverge within steps
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 8,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[8], [16], [32], [64], [128]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.NUM_CLASSES": 10,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "KD.TEACHER.ALLOW_RANDOM": True,
}


TINY_SEGMENTOR = {
    **TINY,
    "MODEL.META_ARCHITECTURE": "DistilledSemanticSegmentor",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 11,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 8,
    "MODEL.SEM_SEG_HEAD.NORM": "",
}
TINY_PANOPTIC = {
    **TINY_SEGMENTOR,
    "MODEL.META_ARCHITECTURE": "DistilledPanopticFPN",
    "MODEL.MASK_ON": True,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 5,
    "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
}

# A RetinaNet of the same size, as overrides of TINY.
RETINANET = (
    "MODEL.META_ARCHITECTURE", "DistilledRetinaNet", "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64]], "MODEL.RETINANET.NUM_CLASSES", 10,
    "MODEL.RETINANET.NUM_CONVS", 1, "MODEL.RETINANET.PRIOR_PROB", 0.3,
)  # fmt: skip

# A short DeepKD training of each meta-architecture on the digits: its network and its own words. Two compare feature
# maps, too.
MIXED = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16", "SOLVER.ACCUMULATE_STEPS", 2)
REVIEW = ("KD.FEATURE.NAME", "review", "KD.FEATURE.IN_FEATURES", "['p2', 'p3']")  # with parameters of its own
ARCHITECTURES = {
    "rcnn": (TINY, (*REVIEW, "DATASETS.TRAIN", "('digits_train',)")),
    "retinanet": (TINY, (*RETINANET, *MIXED, "DATASETS.TRAIN", "('digits_train',)")),
    "segmentation": (TINY_SEGMENTOR, (*MIXED, "DATASETS.TRAIN", "('digits_sem_seg_val',)", "KD.PIXELS.SAMPLE", 50)),
    "panoptic": (
        TINY_PANOPTIC,
        (
            *MIXED, *REVIEW, "DATASETS.TRAIN", "('digits_panoptic_val',)", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2,
            "INPUT.MASK_FORMAT", "bitmask",
        ),
    ),
}  # fmt: skip


def write_training(folder: Path, architecture: str, *overrides: object) -> Path:
    """Write the config of a tiny student of `ARCHITECTURES`, and that of its random teacher of the same kind."""
    tiny, own = ARCHITECTURES[architecture]
    cfg = kd_defaults()
    cfg.merge_from_list([word for pair in tiny.items() for word in pair])
    merge_list(cfg, [str(word) for word in (*own, *overrides)])
    teacher, loss = folder / "teacher.yaml", cfg.KD.LOSS.NAME
    cfg.KD.LOSS.NAME = "none"
    teacher.write_text(cfg.dump())
    cfg.KD.LOSS.NAME, cfg.KD.TEACHER.CONFIG_FILE = loss, str(teacher)
    path = folder / "config.yaml"
    path.write_text(cfg.dump())
    return path


def make_batch(images: int = 2, boxes: int = 3, size: int = 64, seed: int = 0) -> list[dict]:
    """Inputs of a detector as its data set mapper makes them: uint8 images, boxes and classes."""
    generator = torch.Generator().manual_seed(seed)
    batch = []
    for _ in range(images):
        corner = torch.rand(boxes, 2, generator=generator) * size / 2
        extent = 8 + torch.rand(boxes, 2, generator=generator) * (size / 2 - 8)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + extent], dim=1))
        instances.gt_classes = torch.randint(10, (boxes,), generator=generator)
        image = torch.randint(256, (3, size, size), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances, "height": size, "width": size})
    return batch


def make_labelled_batch(images: int = 2, classes: int = 11, size: int = 64, seed: int = 0) -> list[dict]:
    """`make_batch` with a label map of blobs, a tenth of whose pixels are ignored (255), and masks of the boxes."""
    batch, generator = make_batch(images, size=size, seed=seed), torch.Generator().manual_seed(seed)
    for item in batch:
        coarse = torch.randint(classes, (1, 1, size // 8, size // 8), generator=generator).float()
        labels = torch.nn.functional.interpolate(coarse, scale_factor=8)[0, 0].long()
        item["sem_seg"] = labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.1, 255)
        masks = torch.zeros(len(item["instances"]), size, size, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(
            masks, item["instances"].gt_boxes.tensor.int().tolist(), strict=True
        ):
            mask[top:bottom, left:right] = True
        item["instances"].gt_masks = BitMasks(masks)
    return batch
