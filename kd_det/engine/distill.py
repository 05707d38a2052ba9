"""From a trained detector to a smaller one: data, config, forecast, training, export and table, each resumable."""

import argparse
import contextlib
import gc
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from kd_core.utils.config import changes_as_yaml, lookup, merge_list, set_values
from kd_core.utils.data_check import summary
from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text
from kd_core.utils.latency import COST_HEADERS, Cost, clock, cost_cells, measure_cost
from kd_core.utils.packaged_weights import weights_at_hand
from kd_core.utils.report.live import write_distillation_report
from kd_core.utils.report.page import Page
from kd_core.utils.report.runs import Run
from kd_core.utils.resume import remember_request
from kd_core.utils.run_info import EVALUATION, write_run_info
from kd_det.analysis.cost import measure
from kd_det.checkpoint.checkpointer import WholeCheckpointer, check_local_file
from kd_det.checkpoint.resume import check_resumable
from kd_det.checks import check_named, training_checks
from kd_det.config import read_config
from kd_det.config.defaults import kd_defaults
from kd_det.config.derive import METHODS, Request, check_request, derive_student, has_weights
from kd_det.config.files import merge_file
from kd_det.data import register_datasets
from kd_det.data.check import FATAL, UNREADABLE, check_coco, coco_paths
from kd_det.data.loader import check_annotated
from kd_det.data.voc import VocDataset, to_coco
from kd_det.engine.launch import choose_device
from kd_det.engine.trainer import DistillationTrainer
from kd_det.evaluation.report import read_run
from kd_det.evaluation.visualize import Detector
from kd_det.export import read_student, save_plain, save_torchscript
from kd_det.modeling.backbone.spread import map_spread, suggest_fpn_norm
from kd_det.modeling.meta_arch.registry import PIXEL_CLASSES, class_keys
from kd_det.modeling.teacher.build import teacher_builders, teacher_config
from kd_det.modeling.teacher.lazy import is_lazy, load_lazy

logger = logging.getLogger(__name__)

SPREAD_IMAGES = 4  # images on which the spread of the feature maps is measured


def distill(args: argparse.Namespace) -> None:
    """The whole way; a step that was finished before is skipped.

    Raises:
        UserError: what is wrong with the arguments, the teacher or the data, before any training starts.
    """
    warnings.simplefilter("ignore")
    output = Path(args.output)
    if args.num_gpus > max(torch.cuda.device_count(), 1):
        raise UserError(f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}")
    changeable = ("output", "num_gpus", "baseline", "resume", "like_teacher", "torchscript")
    config_file, baseline_file = output / "distill.yaml", output / "baseline.yaml"
    request = {key: value for key, value in vars(args).items() if key not in changeable}
    remember_request(output / "distill.json", request, config_file)
    is_new = not config_file.is_file()
    cfg = build_config(args, output) if is_new else read(config_file)
    files = {config_file: cfg.clone(), baseline_file: without_teacher(cfg.clone())}
    choose_device(cfg, args.num_gpus)
    costs = forecast(cfg, max(args.num_gpus, 1), args.baseline)
    if is_new:  # not before: until then, a request that failed may be corrected
        say(f"student's config: {config_file} (yours to edit; tools/train_net.py trains it, too)")
    for path, config in files.items():
        if is_new or path == baseline_file:
            write_text(path, changes_as_yaml(config, kd_defaults(), header(args, path)))
    results = {"teacher": evaluate_teacher(cfg, output)}
    for name, file in {"student": config_file, **({"baseline": baseline_file} if args.baseline else {})}.items():
        train(file, output / name, args.num_gpus)
        results[name] = figures(output / name)
    conclude(output, results, costs)
    if cfg.REPORT.ENABLED:
        write_page(output, results, costs["teacher"])
    export(output / "student", output / "export", args.torchscript)


def build_config(args: argparse.Namespace, output: Path) -> CfgNode:
    """The derived config, with its data checked."""
    teacher_file, teacher_weights = args.teacher
    asked = kd_defaults()
    asked.KD.TEACHER.CONFIG_FILE, asked.KD.TEACHER.WEIGHTS = teacher_file, teacher_weights
    asked.KD.TEACHER.OVERRIDES = list(args.teacher_override or [])
    check_local_file("--teacher", teacher_weights)
    if args.student_weights != "timm":
        check_local_file("--student-weights", args.student_weights or "", "'timm' downloads timm's")
    teacher = teacher_config(asked, any_classes=True)
    if is_lazy(teacher_file) and "roi_heads" not in load_lazy(teacher_file, asked.KD.TEACHER.OVERRIDES).model:
        raise UserError(
            f"--teacher: {teacher_file} has no roi_heads, and students of a LazyConfig are derived for box heads only: "
            "where detectron2 has the same detector as a yaml, name that"
        )
    if PIXEL_CLASSES in class_keys(teacher.MODEL.META_ARCHITECTURE):
        raise UserError(
            f"--teacher: {teacher_file} is a {teacher.MODEL.META_ARCHITECTURE}, and students are derived from "
            "detectors only: write the student's config (docs/segmentation.md) and train it with tools/train_net.py"
        )
    weights = weights_at_hand(args.student, timm) if args.student_weights is None else args.student_weights
    request = Request(
        student=args.student,
        method=args.method,
        scale=args.scale,
        width=args.width,
        iterations=args.iterations,
        epochs=args.epochs,
        processes=max(args.num_gpus, 1),
        batch=args.batch,
        weights=weights,
    )
    check_request(teacher, request)
    set_data(teacher, args, output)
    options = dict(zip(args.options[::2], args.options[1::2], strict=False))
    skips_bad_images = options.get("DATASETS.BAD_IMAGES") == "skip"
    request = replace(request, images=check_data(teacher, skips_bad_images))
    say_weights(args.student, weights)
    cfg = derive_student(teacher, request)
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = teacher_file, teacher_weights
    cfg.KD.TEACHER.OVERRIDES = asked.KD.TEACHER.OVERRIDES
    cfg.OUTPUT_DIR = str(output / "student")
    set_neck(cfg)
    merge_list(cfg, args.options)
    check_named(cfg, "TEST")
    for check in training_checks(cfg, max(args.num_gpus, 1)):
        check.run()
    for name in cfg.DATASETS.TRAIN:
        check_annotated(cfg, DatasetCatalog.get(name))
    return cfg


def set_data(cfg: CfgNode, args: argparse.Namespace, output: Path) -> None:
    """The data that the command names, else those of the teacher's config; the number of classes must agree."""
    splits: dict[str, tuple[str, str]] = {}
    if args.voc:
        folder = Path(args.voc)
        dataset = VocDataset(folder)
        for split, words in (("train", args.voc_splits[0]), ("val", args.voc_splits[1])):
            coco, _ = to_coco(dataset, words)
            path = output / f"{split}.json"
            write_text(path, json.dumps(coco))
            splits[split] = (str(path.resolve()), str((folder / "JPEGImages").resolve()))
    for split in ("train", "val"):
        if given := getattr(args, split):
            splits[split] = (str(Path(given[0]).resolve()), str(Path(given[1]).resolve()))
    if splits and splits.keys() != {"train", "val"}:
        raise UserError(f"--{next(iter(splits))} is given alone: give both --train JSON IMAGES and --val JSON IMAGES")
    if splits:
        prefix = "distill_" if any(f"{output.name}_{split}" in DatasetCatalog for split in splits) else ""
        names = {split: f"{prefix}{output.name}_{split}" for split in splits}
        cfg.DATASETS.REGISTER = [[names[split], *paths] for split, paths in splits.items()]
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (names["train"],), (names["val"],)
    if not cfg.DATASETS.TRAIN or not cfg.DATASETS.TEST:
        raise UserError("the teacher's config names no data: give --train JSON IMAGES and --val JSON IMAGES, or --voc")


def check_data(cfg: CfgNode, skips_bad_images: bool = False) -> int:
    """Look at every image and box of the COCO json files; returns the number of training images."""
    register_datasets(cfg)
    splits = {}
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        if name not in DatasetCatalog:
            raise UserError(f"the teacher's config names the data set {name!r}, unknown here: give --train and --val")
        if name.startswith("digits_"):
            DatasetCatalog.get(name)  # written when it is first asked for
        if paths := coco_paths(name):
            splits[name] = paths
    files, together = check_coco(list(splits.values()))
    for name, file in zip(splits, files, strict=True):
        say(f"{name}: {len(file.content['images'])} images, {len(file.content['annotations'])} boxes")
        for line in file.report.lines():
            say(f"  {line}")
        skipped = UNREADABLE if skips_bad_images and name in cfg.DATASETS.TRAIN else ()
        broken = [k for k in (*FATAL, *UNREADABLE) if k in file.report.problems and k not in skipped]
        if broken:
            raise UserError(
                f"{name}: {summary(broken[0], file.report.problems[broken[0]])}. `tools/check_data.py {file.json_file} "
                f"{file.image_root} --output cleaned.json` writes a json without it"
            )
    for line in together.lines():
        say(f"  {line}")
    classes = {
        name: len(file.content["categories"]) for name, file in zip(splits, files, strict=True)
    }
    known = lookup(cfg, class_keys(cfg.MODEL.META_ARCHITECTURE)[0])
    for name, count in classes.items():
        if count != known:
            raise UserError(
                f"the teacher knows {known} classes and {name} has {count}: a student learns "
                "the teacher's classes. Train the teacher on these data first"
            )
    return sum(len(DatasetCatalog.get(name)) for name in cfg.DATASETS.TRAIN)


def say_weights(student: str, weights: str) -> None:
    """Where the student's first weights come from, and how to get better ones."""
    if weights:
        say(f"{student} starts from ImageNet weights: {weights}")
    elif not student.endswith((".yaml", ".yml")):
        say(
            f"{student} starts from scratch, with norms and a warm-up for that: no ImageNet weights were found here. "
            "--student-weights timm downloads timm's, --student-weights FILE takes a file (tools/convert_weights.py "
            "makes them, `efficientnet-lite0` without a hub)"
        )


def set_neck(cfg: CfgNode) -> None:
    """The FPN norm that suits the spread of the backbone's maps, measured on a few training images."""
    check_local_file("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    model = build_model(on_cpu(cfg, loss="none"))
    with quiet():  # a training says what it loads
        WholeCheckpointer(model, save_to_disk=False).load(cfg.MODEL.WEIGHTS)
    bottom_up = getattr(model.backbone, "bottom_up", None)
    if bottom_up is None:
        return
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])[:SPREAD_IMAGES]
    spread = map_spread(bottom_up, example_images(model, cfg, records), trained=has_weights(cfg))
    norm = suggest_fpn_norm(spread)
    say(
        "standard deviation of the backbone's maps: "
        + ", ".join(f"{name} {value:.2g}" for name, value in spread.items())
        + (f"; MODEL.FPN.NORM {norm}" if norm else "; the FPN needs no norm")
    )
    if norm:
        cfg.MODEL.FPN.NORM = norm


def example_images(model: nn.Module, cfg: CfgNode, records: list[dict[str, Any]]) -> torch.Tensor:
    """Normalised training images in one batch, as the student sees them."""
    student = Detector("student", model, cfg)
    return model.preprocess_image([student.read(record["file_name"]) for record in records]).tensor


def without_teacher(cfg: CfgNode) -> CfgNode:
    """The same student and schedule, trained on the labels alone."""
    set_values(cfg, {"SOLVER.OPTIMIZER": "sgd", "SOLVER.STEP": "paper", "SOLVER.MOMENTA": ""})
    cfg.KD = kd_defaults().KD
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR).with_name("baseline"))
    return cfg


def on_cpu(cfg: CfgNode, loss: str) -> CfgNode:
    """A copy for looking at the network only."""
    copy = cfg.clone()
    copy.defrost()
    copy.MODEL.DEVICE, copy.KD.LOSS.NAME, copy.KD.FEATURE.NAME = "cpu", loss, "none"
    return copy


def forecast(cfg: CfgNode, processes: int, baseline: bool) -> dict[str, Cost]:
    """Say what will come out, and how long it will take; returns the costs of teacher and student."""
    register_datasets(cfg)
    path = DatasetCatalog.get(cfg.DATASETS.TEST[0])[0]["file_name"]
    teacher_cfg = teacher_config(cfg)
    with quiet():
        teacher = teacher_builders(cfg)[0]()
        student = build_model(on_device(cfg))
        costs = {
            "teacher": measure_cost(teacher, [Detector("teacher", teacher, teacher_cfg).read(path)]),
            "student": measure_cost(student, [Detector("student", student, cfg).read(path)]),
        }
        del teacher, student
        step = measure(cfg, processes, stands_in=False)
    rows = [[name, *cost_cells(cost)] for name, cost in costs.items()]
    say("\n" + tabulate(rows, ["", *COST_HEADERS], tablefmt="github", disable_numparse=True))
    trainings = "two trainings of" if baseline else "training:"
    say(
        f"{trainings} {cfg.SOLVER.MAX_ITER} iterations of {cfg.SOLVER.IMS_PER_BATCH} images, about "
        f"{clock(step.total_seconds)} {'each ' if baseline else ''}on this machine, evaluation not counted\n"
    )
    return costs


def on_device(cfg: CfgNode) -> CfgNode:
    """A copy of the student's config without distillation."""
    copy = on_cpu(cfg, loss="none")
    copy.MODEL.DEVICE = cfg.MODEL.DEVICE
    return copy


def evaluate_teacher(cfg: CfgNode, output: Path) -> dict[str, float]:
    """The teacher's AP on the student's test data, the first set of several, evaluated once."""
    path = output / "teacher" / "results.json"
    on = {"DATASETS.TEST": list(cfg.DATASETS.TEST)}  # distill.yaml may have been edited since
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if earlier.get("DATASETS.TEST") == on["DATASETS.TEST"]:
        return earlier
    say("evaluating the teacher …")
    config = teacher_config(cfg)
    config.DATASETS.TEST, config.OUTPUT_DIR = cfg.DATASETS.TEST, str(path.parent)
    config.DATASETS.REGISTER = cfg.DATASETS.REGISTER  # by which a report knows that the images are the student's
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        results = DistillationTrainer.test(config, teacher_builders(cfg)[0]())
    first = results[cfg.DATASETS.TEST[0]] if len(cfg.DATASETS.TEST) > 1 else results
    found = {f"bbox/{key}": float(value) for key, value in first.get("bbox", {}).items()}
    found |= on
    write_text(path, json.dumps(found))
    write_text(path.parent / "config.yaml", config.dump())  # with evaluation.json a run of which reports are made
    flat, weights = flatten_results_dict(results), cfg.KD.TEACHER.WEIGHTS
    write_run_info(path.parent, 0, EVALUATION, evaluated=weights, results=flat)
    say(f"teacher: {found.get('bbox/AP', float('nan')):.2f} AP")
    return found


def train(config_file: Path, output: Path, num_gpus: int) -> None:
    """One training in a process of its own, from its last checkpoint if there is one, unless it is finished."""
    if (output / "finished").is_file():
        check_resumable(read_config(str(config_file), ["OUTPUT_DIR", str(output)]))  # it may have been edited since
        say(f"{output} is finished")
        return
    say(f"training into {output} …")
    command = [sys.executable, "-m", "kd_det.engine.train", "--config-file", str(config_file), "--resume"]
    command += ["--num-gpus", str(num_gpus), "OUTPUT_DIR", str(output)]
    gc.collect()  # what the forecast and the teacher's evaluation hold of the GPU belongs to the training now
    torch.cuda.empty_cache()
    code = subprocess.run(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode
    if code:
        sys.exit(code)  # it has said why
    write_text(output / "finished", "")


def figures(output: Path) -> dict[str, float]:
    """AP of the last evaluation, and the training time."""
    run = read_run(output)
    return {"bbox/AP": run.ap, "bbox/AP50": run.ap50, "bbox/AP75": run.ap75, "training_seconds": run.training_seconds}


def export(training: Path, folder: Path, torchscript: bool) -> None:
    """The student for plain detectron2, and as TorchScript where this detectron2 can write that."""
    student = read_student(training)
    folder.mkdir(parents=True, exist_ok=True)
    say(f"exported: {', '.join(map(str, save_plain(student, folder)))}")
    if torchscript:
        try:
            with quiet():
                save_torchscript(student, folder / "student.ts")
        except UserError as error:
            raise UserError(
                f"the student is trained and exported, but not as TorchScript: {error} (--no-torchscript leaves it out)"
            ) from error
        say(f"exported: {folder / 'student.ts'}")


def conclude(output: Path, results: dict[str, dict], costs: dict[str, Cost]) -> None:
    """The table, printed and kept."""
    rows = []
    for name, found in results.items():
        cost = costs["teacher" if name == "teacher" else "student"]
        seconds = found.get("training_seconds")
        rows.append(
            [
                name,
                *(f"{found.get(f'bbox/{key}', float('nan')):.2f}" for key in ("AP", "AP50", "AP75")),
                *cost_cells(cost),
                "" if seconds is None else clock(seconds),
            ]
        )
    headers = ["", "AP", "AP50", "AP75", *COST_HEADERS, "training time"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    write_text(output / "table.md", table + "\n")
    summary = {"results": results, "costs": {name: asdict(cost) for name, cost in costs.items()}}
    write_text(output / "results.json", json.dumps(summary, indent=1))
    say(f"\n{table}\n\ntable: {output / 'table.md'}")


def write_page(output: Path, names: Iterable[str], of_teacher: Cost) -> None:
    """report.html about teacher, student and baseline."""
    # with pycocotools and matplotlib
    from kd_det.analysis.flops import measure_cost
    from kd_det.evaluation.html_report import detector_page, read_detector_run

    def make_page(runs: list[Run], title: str) -> Page:
        measure_cost(runs)
        for run in runs:
            if run.role == "teacher":
                run.info |= {"parameters": of_teacher.parameters, "gflops": of_teacher.gflops}
        return detector_page(runs, title)

    with quiet():
        written = write_distillation_report(output, names, read_detector_run, make_page)
    if written:
        say(f"report: {output / 'report.html'}")


def read(path: Path) -> CfgNode:
    """kd_det's config in a file."""
    cfg = kd_defaults()
    merge_file(cfg, str(path))
    return cfg


def header(args: argparse.Namespace, path: Path) -> str:
    """The comment at the head of a derived config."""
    return (
        f"# {args.student} from {args.teacher[0]}, derived by tools/distill.py; edit it as you like.\n"
        f"#   tools/train_net.py --config-file {path}\n"
    )


def say(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep detectron2's log off the console."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr if sys.stderr.isatty() else open(os.devnull, "w")):
            yield
    finally:
        logging.disable(logging.NOTSET)


def parser(usage: str) -> argparse.ArgumentParser:
    """The arguments of tools/distill.py."""
    p = argparse.ArgumentParser(description=usage, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--teacher", nargs=2, required=True, metavar=("CONFIG", "WEIGHTS"), help="a detectron2 yaml or .py")
    p.add_argument("--teacher-override", nargs="+", metavar="KEY=VALUE", help="overrides of a LazyConfig teacher")
    p.add_argument("--student", required=True, help="resnet18 …, any model of timm's, or a detectron2 yaml")
    p.add_argument("--output", required=True, help="folder of everything; the same command resumes there")
    p.add_argument("--method", default="dkd", help=f"{', '.join(METHODS)} (default: dkd)")
    p.add_argument("--student-weights", help="'timm', a file, 'efficientnet-lite0' …, '' for none (default: local)")
    p.add_argument("--scale", type=float, default=1.0, help="size of the student's images as a share of the teacher's")
    p.add_argument("--width", type=float, default=1.0, help="width of FPN and box head as a share of the teacher's")
    p.add_argument("--train", nargs=2, metavar=("JSON", "IMAGES"), help="COCO json and images (default: the teacher's)")
    p.add_argument("--val", nargs=2, metavar=("JSON", "IMAGES"), help="the same, to evaluate on")
    p.add_argument("--voc", metavar="FOLDER", help="PASCAL VOC folder in place of --train and --val")
    p.add_argument("--voc-splits", nargs=2, default=("train", "val"), metavar="LIST", help="default: train val")
    length = p.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=int, help="length of the training")
    length.add_argument("--epochs", type=float, help="length in passes over the training images")
    length.add_argument("--like-teacher", action="store_true", help="as many images as the teacher's config (default)")
    p.add_argument("--batch", type=int, help="images per iteration (default: the teacher's, at most 4 per process)")
    p.add_argument("--num-gpus", type=int, default=torch.cuda.device_count(), help="default: all that there are")
    p.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    p.add_argument("--no-torchscript", dest="torchscript", action="store_false", help="do not export TorchScript")
    p.add_argument("--resume", action="store_true", help="accepted for habit: the same command always resumes")
    p.add_argument("options", nargs="*", metavar="KEY VALUE", help="config keys of the student")
    return p
