#!/usr/bin/env python
"""Train or evaluate a detector that a LazyConfig describes, plain or distilled.

    tools/lazyconfig_train_net.py --config-file configs/LazyCOCO/deepkd_r18_vitdet_b.py --num-gpus 8
    tools/lazyconfig_train_net.py --config-file configs/LazyCOCO/dkd_r18_lsj_r101.py train.ema.enabled=True
    tools/lazyconfig_train_net.py --config-file my.py --resume         # from the last checkpoint of train.output_dir
    tools/lazyconfig_train_net.py --config-file my.py --eval-only train.init_checkpoint=output/model_final.pth

A LazyConfig is Python code, which this runs. It defines what detectron2's tool of this name reads (model, dataloader,
optimizer, lr_multiplier, train); the engine is that of tools/train_net.py. `train` also takes seed, amp.dtype,
accumulate_steps, ema.enabled, ema.decay, ema.warmup, clip.max_norm, clip.norm_type and bad_images; train.ddp is not
read. The student is a kd_det.DistilledRCNN built by keyword, or any detector. key=value words come last.
"""

import argparse

from detectron2.engine import default_argument_parser

from kd_det.engine.launch import add_verbose, run_command
from kd_det.engine.lazy_trainer import main


def parse_args() -> argparse.Namespace:
    """detectron2's own arguments, and --verbose."""
    parser = add_verbose(default_argument_parser(epilog=" "))
    parser.description = __doc__
    return parser.parse_args()


if __name__ == "__main__":
    run_command("lazyconfig_train_net", main, parse_args())
