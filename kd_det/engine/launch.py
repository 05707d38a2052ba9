"""From a command line to a running process: arguments, config, device and process group."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException

import kd_core
from kd_core.utils.files import sweep_unfinished, write_text
from kd_core.utils.wandb import import_wandb
from kd_det.checkpoint.resume import changed_keys, config_file, saved_config
from kd_det.checks import check_before_training, check_data
from kd_det.config.defaults import kd_defaults, merge_file, merge_list
from kd_det.config.merge import all_keys, lookup

logger = logging.getLogger(__name__)

PACKAGES = [Path(package.__file__).parent for package in (kd_core, sys.modules[__package__])]
TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's evaluation


def argument_parser(usage: str) -> argparse.ArgumentParser:
    """detectron2's own parser, opened by what the tool does and how it is called."""
    parser = default_argument_parser(epilog=" ")
    parser.description = usage
    parser.add_argument(
        "--list-keys", action="store_true", help="print the keys and their values under --config-file, and end"
    )
    return parser


def list_keys(path: str, prefixes: list[str]) -> str:
    """`KEY VALUE` lines of the config in `path`, or of the defaults; only those under one of `prefixes`, if any."""
    cfg = read_config(path, []) if path else kd_defaults()
    wanted = [key for key in all_keys(cfg) if not isinstance(lookup(cfg, key), CfgNode)]
    if prefixes:
        wanted = [key for key in wanted if any(f"{key}.".startswith(f"{prefix}.") for prefix in prefixes)]
    if not wanted:
        raise ValueError(f"--list-keys: there are no keys under {' or '.join(prefixes)}")
    return "\n".join(f"{key} {lookup(cfg, key)!r}" for key in wanted)


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
    if cfg.WANDB.ENABLED:
        import_wandb()
    changed = changed_keys(cfg) if args.resume else []
    saved = saved_config(cfg.OUTPUT_DIR) if args.resume or args.eval_only else None
    comm.synchronize()
    default_setup(cfg, args)
    if comm.is_main_process():
        sweep_unfinished(cfg.OUTPUT_DIR)
        if saved is not None:  # that of the training, until a resume is accepted (`DistillationTrainer.resume_or_load`)
            write_text(config_file(cfg.OUTPUT_DIR), saved)
    for name in ("kd_det", "kd_core"):  # default_setup opens the log for detectron2 and fvcore only
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
    if changed:
        logger.warning("--resume: this config is not that of OUTPUT_DIR's config.yaml: %s", "; ".join(changed))
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


def run_command(name: str, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """`launch_training`; bad input ends it with one sentence on stderr and exit status 1, a bug with its traceback.

    Args:
        name: of the tool, which opens the sentence.
    """
    try:
        end_in_one_line(name, partial(launch_training, partial(end_in_one_line, name, main)), args)
    except ProcessExitedException as error:  # a process that `launch` started; it has said why
        sys.exit(error.exit_code)


def end_in_one_line(name: str, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """`main(args)`, with `SystemExit` in place of an error that is the user's to mend; in any process."""
    try:
        return main(args)
    except (ValueError, OSError, FloatingPointError) as error:
        if not is_clear(error):
            raise
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\n{name}: interrupted; --resume goes on from the last checkpoint in OUTPUT_DIR")


def is_clear(error: Exception) -> bool:
    """Whether an error was made to be read: our packages raised it, or the operating system, which names a file."""
    if isinstance(error, OSError):
        return error.filename is not None
    *_, (frame, _) = walk_tb(error.__traceback__)
    return any(Path(frame.f_code.co_filename).is_relative_to(package) for package in PACKAGES)


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
