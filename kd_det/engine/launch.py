"""From a command line to a running process: arguments, config, device and process group."""

import argparse
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from kd_core.utils.config import find_config, list_values
from kd_core.utils.errors import UserError, exit_on_user_error
from kd_core.utils.files import set_aside, sweep_unfinished, write_whole
from kd_det.checkpoint.resume import check_resumable, config_file
from kd_det.checks import check_before_evaluation, check_before_training
from kd_det.config import kd_defaults, read_config
from kd_det.engine.console import open_logs, quiet_console
from kd_det.evaluation.evaluator import DETECTIONS

INTERRUPTED = "interrupted; --resume continues from the last checkpoint in OUTPUT_DIR"
TIMEOUT = timedelta(minutes=30)  # a rank may wait for another's evaluation


def argument_parser(usage: str) -> argparse.ArgumentParser:
    """detectron2's own parser, with our options; its help starts with `usage`."""
    parser = default_argument_parser(epilog=" ")
    parser.description = usage
    parser.add_argument(
        "--list-keys", action="store_true", help="print the keys and values of --config-file, and exit"
    )
    return add_verbose(parser)


def add_verbose(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """--verbose: config, environment and model on the console, too."""
    help_text = "also print config, environment and model, which log.txt always has"
    parser.add_argument("--verbose", action="store_true", help=help_text)
    return parser


def list_keys(path: str, prefixes: list[str]) -> str:
    """`KEY VALUE` lines of the config in `path`, or of the defaults; only those under one of `prefixes`, if any."""
    return list_values(read_config(path, []) if path else kd_defaults(), prefixes)


def setup(args: argparse.Namespace) -> CfgNode:
    """The frozen config of the command line, checked; prepares logging, seeds and OUTPUT_DIR.

    Raises:
        UserError: what is wrong with the config file, a key, a data set or the weights, before anything is built.
    """
    args.config_file = find_config(args.config_file)  # default_setup logs the file
    cfg = read_config(args.config_file, args.opts)
    choose_device(cfg, args.num_gpus)
    cfg.freeze()
    if args.eval_only:
        check_before_evaluation(cfg)
    else:
        check_before_training(cfg, resume=args.resume)
        if args.resume:
            check_resumable(cfg)
    prepare_output(cfg, args, cfg.OUTPUT_DIR)
    return cfg


def prepare_output(cfg: Any, args: argparse.Namespace, output_dir: str) -> None:
    """`default_setup` for a config, with our logs.

    An evaluation leaves the training's config.yaml as it was. A training that starts anew forgets the last checkpoint
    of an earlier one in its folder: `--resume` would continue that, until it has written a checkpoint of its own. It
    sets aside the best weights, metrics and detections of the earlier one: `--resume` and a report would take them for
    its own.
    """
    written = config_file(output_dir)
    trainings = written.read_bytes() if args.eval_only and written.is_file() else None
    comm.synchronize()
    if comm.is_main_process() and not args.eval_only and not args.resume:
        Path(output_dir, "last_checkpoint").unlink(missing_ok=True)
        for name in ("model_best.pth", "model_best_ema.pth", "metrics.json", DETECTIONS, f"ema/{DETECTIONS}"):
            set_aside(Path(output_dir, name))
    open_logs(output_dir)
    if not getattr(args, "verbose", False):
        quiet_console()
    default_setup(cfg, args)
    if comm.is_main_process():
        if not args.eval_only:
            sweep_unfinished(output_dir)
        elif trainings is not None:
            write_whole(written, lambda file: file.write(trainings))


def choose_device(cfg: CfgNode, num_gpus: int) -> None:
    """CUDA where there is one and --num-gpus is not 0, else the CPU."""
    if cfg.MODEL.DEVICE.startswith("cuda") and (num_gpus == 0 or not torch.cuda.is_available()):
        cfg.MODEL.DEVICE = "cpu"


def run_command(name: str, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Run `main(args)` in every process; the user's errors end it in one line, bugs with their traceback.

    Args:
        name: of the tool, which opens the line.
        main: importable by the processes that `launch` starts.
        args: of the command line, read by `argument_parser`.
    """
    in_process = partial(run_in_process, name, main)
    try:
        exit_on_user_error(name, partial(launch_training, in_process, args), INTERRUPTED)
    except ProcessExitedException as error:  # a process that `launch` started, and that has printed its error
        sys.exit(error.exit_code)


def run_in_process(name: str, main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """`main(args)`, ended by `exit_on_user_error`, in one of the processes."""
    return exit_on_user_error(name, partial(main, args), INTERRUPTED)


def launch_training(main: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> Any:
    """Run `main(args)` in every process: those torchrun has started, else those that detectron2's `launch` starts.

    Raises:
        UserError: several machines without GPUs, which `launch` would run as separate trainings.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        join_process_group(args.num_gpus)
        return main(args)
    if args.num_gpus == 0 and args.num_machines > 1:
        raise UserError(
            f"--num-machines {args.num_machines} with --num-gpus 0 would run {args.num_machines} "
            f"separate trainings: start CPU processes with `torchrun --nnodes {args.num_machines} --nproc-per-node 1 "
            "tools/train_net.py … --num-gpus 0`"
        )
    if args.num_gpus > torch.cuda.device_count() and args.num_gpus > 1:
        raise UserError(
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
