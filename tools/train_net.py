#!/usr/bin/env python
"""Train or evaluate a detector, plain or distilled.

tools/train_net.py --config-file configs/COCO/dkd_r18_r101.yaml --num-gpus 8
tools/train_net.py --config-file configs/Digits/dkd.yaml --num-gpus 0 SOLVER.MAX_ITER 80
tools/train_net.py --config-file configs/Digits/dkd.yaml --eval-only MODEL.WEIGHTS output/digits/dkd/model_final.pth
"""

from kd_det.engine import DistillationTrainer
from kd_det.launch import argument_parser, launch_training, setup


def main(args):
    cfg = setup(args)
    if args.eval_only:
        return DistillationTrainer.evaluate_only(cfg, resume=args.resume)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    launch_training(main, argument_parser(__doc__).parse_args())
