"""From a command line to a running process: arguments, config, device and process group."""

import argparse
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from kd_core.files import sweep_unfinished

from .checks import check_before_training, check_data
from .config import kd_defaults, merge_file, merge_list

TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's evaluation


def argument_parser(usage: str) -> argparse.ArgumentParser:
    """detectron2's own parser, opened by what the tool does and how it is called."""
    parser = default_argument_parser(epilog=" ")
    parser.description = usage
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line, checked; logging, seeds and OUTPUT_DIR made ready.

    Raises:
        ValueError: what is wrong with the config file, a key, a data set or the weights, before anything is built.
    """
    cfg = read_config(args.config_file, args.opts)
    choose_device(cfg, args.num_gpus)
    cfg.freeze()
    check_data(cfg, training=not args.eval_only)
    if not args.eval_only:
        check_before_training(cfg, resume=args.resume)
    default_setup(cfg, args)
    if comm.is_main_process():
        sweep_unfinished(cfg.OUTPUT_DIR)
    for name in ("kd_det", "kd_core"):  # default_setup opens the log for detectron2 and fvcore only
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
    return cfg


def read_config(path: str, options: list[str]) -> CfgNode:
    """kd_det's defaults, the yaml file and the overrides of the command line, in that order."""
    cfg = kd_defaults()
    if not path:
        raise ValueError("--config-file is missing: give one of configs/, or your own")
    if not os.path.isfile(path):
        raise ValueError(f"--config-file: there is no file {path}")
    merge_file(cfg, path)
    merge_list(cfg, options)
    return cfg


def choose_device(cfg: CfgNode, num_gpus: int) -> None:
    """CUDA where there is one and --num-gpus is not 0, else the CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and (num_gpus == 0 or not torch.cuda.is_available()):
        cfg.MODEL.DEVICE = "cpu"


def launch_training(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run `main(args)` in every process: those torchrun has started, else those that detectron2's `launch` starts.

    Raises:
        ValueError: several machines without GPUs, which `launch` would run as separate trainings.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        join_process_group(args.num_gpus)
        return main(args)
    if args.num_gpus == 0 and args.num_machines > 1:
        raise ValueError(
            f"--num-machines {args.num_machines} with --num-gpus 0 would run {args.num_machines} "
            f"separate trainings: start CPU processes with `torchrun --nnodes {args.num_machines} --nproc-per-node 1 "
            "tools/train_net.py … --num-gpus 0`"
        )
    if args.num_gpus > torch.cuda.device_count() and args.num_gpus > 1:
        raise ValueError(
            f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}: on CPU start them with "
            f"`torchrun --nproc-per-node {args.num_gpus} tools/train_net.py … --num-gpus 0`"
        )
    return launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def join_process_group(num_gpus: int) -> None:
    """Join torchrun's processes: NCCL with a GPU each, gloo on CPU (--num-gpus 0, or no GPU)."""
    cuda = num_gpus != 0 and torch.cuda.is_available()
    rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world, timeout=TIMEOUT)
    for machine in range(world // per_machine):  # every process must take part in making every group
        ranks = list(range(machine * per_machine, (machine + 1) * per_machine))
        group = dist.new_group(ranks)
        if rank in ranks:
            comm._LOCAL_PROCESS_GROUP = group
