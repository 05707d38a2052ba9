"""How long a detector's training waits for images:  python benchmarks/kd_det_loader.py [--images JSON DIR]

    digits    the step of kd_det_step.py (ResNet-18 ← ResNet-50, 192 px, 4 images), NUM_WORKERS as the config says
    --images  configs/COCO/dkd_r18_r101.yaml at its own input size on your COCO-format data set, one image
              per step (the config's 8 images on 8 GPUs), random weights

Waiting is the trainer's own `data_time`; on the CPU the loader's processes and the step share the same cores. The
second table gives the parts of mapping one image in one process: `reading` (with decoding), `augmentation` and `rest`
are detectron2's mapper; `ours` is the copy of the record, the seeds and the sampler. Exit code 1 if the step waits for
more than 10 % of its time.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import detection_utils
from figures import ROOT, Bound, Table, judged, options, write_figures
from kd_det_step import DIGITS, step_cfg
from memory import silence_random_blocks
from timing import timed

from kd_det.analysis.iteration import Iteration, build_iteration
from kd_det.config import merge_list
from kd_det.data import register_datasets
from kd_det.data.loader import TrainLoader, build_train_loader
from kd_det.data.two_sizes import build_train_mapper
from kd_det.engine.launch import choose_device, read_config
from kd_det.engine.train_step import build_step
from kd_det.engine.trainer import DistillationTrainer, per_micro_batch

BOUND = 0.1
COCO = ROOT / "configs" / "COCO" / "dkd_r18_r101.yaml"
PARTS = ("reading", "augmentation", "rest", "ours")


class Stopwatch:
    """A function that adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def coco_cfg(json_file: str, folder: str) -> CfgNode:
    """The config of ResNet-18 ← ResNet-101, with random weights, on the user's images."""
    words = ["KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True", "MODEL.WEIGHTS", ""]
    cfg = read_config(str(COCO), [*words, "SOLVER.IMS_PER_BATCH", "1"])
    entry = ["images_of_benchmark", str(Path(json_file).absolute()), str(Path(folder).absolute())]
    merge_list(cfg, ["DATASETS.REGISTER", repr([entry]), "DATASETS.TRAIN", f"('{entry[0]}',)"])
    register_datasets(cfg)
    return cfg


def live_iteration(cfg: CfgNode) -> Iteration:
    """The iteration of `cfg` on batches that its loader prepares meanwhile."""
    choose_device(cfg, num_gpus=1)
    iteration = build_iteration(cfg, batches=1)
    silence_random_blocks(iteration.model)
    loader = DistillationTrainer.build_train_loader(per_micro_batch(cfg))
    iteration.step = build_step(cfg, iteration.model, iter(loader), iteration.step.optimizer)
    return iteration


def waiting(iteration: Iteration, rounds: int) -> tuple[float, float]:
    """Mean seconds of an iteration and of its wait for images, after two warm-up iterations."""
    seconds, waits = [], []
    for _ in range(rounds + 2):
        seconds.append(timed(iteration, time.perf_counter))  # it also waits
        waits.append(iteration.storage.history("data_time").latest())
    return statistics.fmean(seconds[2:]), statistics.fmean(waits[2:])


def mapped(cfg: CfgNode, images: int) -> dict[str, float]:
    """Seconds per image in each part of mapping, in one process."""
    mapper = build_train_mapper(cfg)
    augmentation = mapper.augmentations = Stopwatch(mapper.augmentations)
    with stopwatch_in(detection_utils, "read_image") as reading:
        whole = Stopwatch(mapper)
        loader = build_train_loader(cfg, whole)
        read(loader, 4)  # what happens once
        for watch in (reading, augmentation, whole):
            watch.seconds = 0.0
        total = Stopwatch(read)
        total(loader, images)
    rest = whole.seconds - reading.seconds - augmentation.seconds
    seconds = (reading.seconds, augmentation.seconds, rest, total.seconds - whole.seconds)
    return {part: of_part / images for part, of_part in zip(PARTS, seconds, strict=True)}


def read(loader: TrainLoader, images: int) -> None:
    """The work of the loader's processes, for the first `images` images."""
    for item in islice(chain.from_iterable(loader.batches), images):
        loader.dataset[item]


@contextmanager
def stopwatch_in(module: Any, name: str) -> Iterator[Stopwatch]:
    """A stopwatch in place of a module's function."""
    function = getattr(module, name)
    watch = Stopwatch(function)
    setattr(module, name, watch)
    try:
        yield watch
    finally:
        setattr(module, name, function)


def main() -> int:
    parser = options(__doc__, "kd_det_loader")
    parser.add_argument("--images", nargs=2, metavar=("JSON", "DIR"), help="a data set in COCO's format")
    parser.add_argument("--rounds", type=int, default=20, help="iterations that count")
    parser.add_argument("--mapped", type=int, default=200, help="images that one process maps")
    parser.add_argument("--images-per-second", type=float, nargs="+", default=[10.0, 20.0, 40.0], help="of a GPU")
    args = parser.parse_args()
    waits, parts, bounds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        cfgs = {"digits": step_cfg(DIGITS / "dkd.yaml", Path(folder))}
        if args.images:
            cfgs["--images"] = coco_cfg(*args.images)
        for name, cfg in cfgs.items():
            seconds, wait = waiting(live_iteration(cfg), args.rounds)
            bounds.append(Bound(f"waiting for images / step, {name}", wait / seconds, BOUND))
            share = judged(wait / seconds, BOUND, digits=3)
            waits.append([name, cfg.DATALOADER.NUM_WORKERS, 1e3 * seconds, 1e3 * wait, share])
            of_part = mapped(cfg, args.mapped)
            whole = sum(of_part.values())
            workers = [math.ceil(rate * whole) for rate in args.images_per_second]
            parts.append([name, 1 / whole, *(1e3 * of_part[part] for part in PARTS), *workers])
    tables = {
        "waiting": Table(["", "workers", "step, ms", "waiting, ms", "share (bound)"], waits),
        "mapping": Table(
            ["", "images/s", *(f"{part}, ms" for part in PARTS)]
            + [f"workers for {rate:g} images/s" for rate in args.images_per_second],
            parts,
        ),
    }
    print(*tables.values(), sep="\n\n")
    return write_figures(args.json, tables, bounds)


if __name__ == "__main__":
    raise SystemExit(main())
