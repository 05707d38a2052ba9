"""One training or evaluation of a detector: what tools/train_net.py runs, also as `python -m kd_det.engine.train`."""

import argparse
from typing import Any

from kd_det.engine.launch import argument_parser, list_keys, run_command, setup
from kd_det.engine.trainer import DistillationTrainer


def main(args: argparse.Namespace) -> Any:
    """Train, or evaluate, as the command line says."""
    if args.list_keys:
        return print(list_keys(args.config_file, args.opts))
    cfg = setup(args)
    if args.eval_only:
        return DistillationTrainer.evaluate_only(cfg, resume=args.resume)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def command(name: str = "kd-train") -> None:
    """The console command."""
    run_command(name, main, argument_parser(__doc__).parse_args())


if __name__ == "__main__":
    command("train")
