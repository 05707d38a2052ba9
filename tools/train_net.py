#!/usr/bin/env python
"""Train or evaluate a detector, plain or distilled.

    tools/train_net.py --config-file configs/COCO/deepkd_r18_r101.yaml --num-gpus 8
    tools/train_net.py --config-file configs/Digits/teacher.yaml                         # the teacher of those below
    tools/train_net.py --config-file configs/Digits/dkd.yaml --num-gpus 0 SOLVER.MAX_ITER 80       # on the CPU
    torchrun --nproc-per-node 2 tools/train_net.py --config-file configs/Digits/dkd.yaml --num-gpus 0   # two on the CPU
    tools/train_net.py --config-file configs/Digits/dkd.yaml --resume           # from the last checkpoint in OUTPUT_DIR
    tools/train_net.py --config-file configs/Digits/dkd.yaml --eval-only MODEL.WEIGHTS output/digits/dkd/model_final.pth
    tools/train_net.py --config-file configs/Digits/dkd.yaml --list-keys KD SOLVER        # the keys and their values

KEY VALUE words come last and override the file. kd_det/config/defaults.py explains our keys, and detectron2's
documentation its own. Relative paths start at the working folder, those of data sets at DETECTRON2_DATASETS
(./datasets if that is not set). tools/dry_run.py reports what is missing before a long training.
"""

from kd_det.engine.launch import argument_parser, run_command
from kd_det.engine.train import main

if __name__ == "__main__":
    run_command("train_net", main, argument_parser(__doc__).parse_args())
