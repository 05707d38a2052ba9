#!/usr/bin/env python
"""Which keys that change only the speed of a step are safe, and worth setting, on this machine's GPU?

    make verify-gpu
    tools/verify_gpu.py --only COMPILE            # the rows whose name has this word; several words: one of them

First the tests that need CUDA (pytest -m gpu). Then every fast path beside its slow one, in a process of its own: a
ResNet-18 FPN detector taught by a ResNet-50, and ResNet-8x4 taught by ResNet-32x4, both on the built-in digits and
under DKD with random weights. Compared, in float32 without TF32, are the logits of student and teacher, the loss of the
first step, the losses of all steps and the weights after the last. Rounding alone drives two trainings apart: a ReLU's
gradient jumps at 0, and so does the choice of the boxes that are sampled. So losses and weights may differ ten times as
much as those of a second slow run whose first weights differ by a millionth, or by 1 % (10 % for a 16-bit type).

The gain is slow step / fast step, the median of alternating pairs, in float32 (with torch's own setting of TF32) and
under SOLVER.AMP (on a GPU). A key is worth setting where that is at least 1.03, and above 1 in three pairs of four.
In brackets behind it: how long the slow step takes.

Exit status: 0, 1 if a test fails or a fast path fails or differs, 2 without a GPU, 3 if time was up before the end.
"""

import argparse
import json
import logging
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from kd_core.utils.arguments import count
from kd_core.utils.errors import UserError, exit_on_user_error, one_line

ROOT = Path(__file__).resolve().parents[1]
TIME_WAS_UP = "time was up"
WORTH = 1.03


class Limits(NamedTuple):
    """How far a fast path may be from its slow one; `later` is for later losses and weights, unless noise is larger."""

    logits: float
    first_loss: float
    later: float


FLOAT32 = Limits(1e-3, 1e-3, 1e-2)
# bfloat16 has three digits: it moves the logits of a ResNet-50 with random weights by a quarter of their deviation.
BFLOAT16 = Limits(0.5, 0.02, 0.1)


@dataclass(frozen=True)
class Row:
    """A key: its fast value, its slow one, and what is compared."""

    network: str
    key: str
    on: str = "True"
    off: str = "False"
    limits: Limits = FLOAT32
    cuda_only: bool = False

    @property
    def name(self) -> str:
        return f"{self.network}: {self.key} {self.on}"


# The cheapest come first; those that compile come last.
ROWS = (
    Row("classifier", "SOLVER.CUDA_GRAPH", cuda_only=True),
    Row("classifier", "MODEL.CHANNELS_LAST"),
    Row("classifier", "KD.TEACHER.CHANNELS_LAST"),
    Row("classifier", "KD.TEACHER.FOLD_BN"),
    Row("classifier", "KD.TEACHER.DTYPE", "bfloat16", "float32", BFLOAT16),
    Row("detector", "KD.TEACHER.OVERLAP", cuda_only=True),
    Row("detector", "KD.CHANNELS_LAST"),
    Row("detector", "KD.TEACHER.CHANNELS_LAST"),
    Row("detector", "KD.TEACHER.FOLD_BN"),
    Row("detector", "KD.TEACHER.DTYPE", "bfloat16", "student", BFLOAT16),
    Row("classifier", "KD.LOSS.COMPILE"),
    Row("classifier", "MODEL.COMPILE"),
    Row("classifier", "KD.TEACHER.COMPILE"),
    Row("detector", "KD.LOSS.COMPILE"),
    Row("detector", "KD.TEACHER.COMPILE"),
    Row("detector", "KD.COMPILE"),
)


class DetectorRun:
    """Training steps of a detector under `words` of config, on four batches in memory."""

    config = ROOT / "configs/Digits/dkd.yaml"
    # The student is a whole ResNet-18. FPN and box head are the papers' on a GPU, the digits' on a CPU.
    student = "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.STEM_OUT_CHANNELS 64 MODEL.RESNETS.WIDTH_PER_GROUP 64 " \
              "MODEL.RESNETS.RES2_OUT_CHANNELS 64 DATALOADER.NUM_WORKERS 0"  # fmt: skip
    sizes = {"cuda": (256, 1024, 640, 8), "cpu": (64, 256, 64, 1)}  # FPN, box head, pixels, images

    def __init__(self, words: list[str], device: str, lr: str, work: Path) -> None:
        from detectron2.utils.env import seed_all_rng

        from kd_det.analysis.iteration import build_iteration
        from kd_det.config import read_config

        weights = self.prepare_teacher(device, work)
        fpn, head, pixels, images = self.sizes[device]
        words = [
            *f"{self.student} MODEL.DEVICE {device} SOLVER.IMS_PER_BATCH {images}".split(),
            *f"MODEL.FPN.OUT_CHANNELS {fpn} MODEL.ROI_BOX_HEAD.FC_DIM {head}".split(),
            *f"INPUT.MIN_SIZE_TRAIN ({pixels},) INPUT.MAX_SIZE_TRAIN {pixels}".split(),
            *f"KD.TEACHER.CONFIG_FILE {weights.with_suffix('.yaml')} KD.TEACHER.WEIGHTS {weights}".split(),
            *words,
        ]
        seed_all_rng(0)
        self.iteration = build_iteration(read_config(str(self.config), words), learning_rate=float(lr))
        self.model, self.loss = self.iteration.model, 0.0
        self.model.register_forward_hook(lambda _, __, losses: setattr(self, "loss", sum(losses.values()).detach()))

    @classmethod
    def prepare_teacher(cls, device: str, work: Path) -> Path:
        """A ResNet-50 with random weights, and batch norms that have seen the data; beside it, its yaml."""
        from kd_det.analysis.iteration import build_iteration
        from kd_det.config import read_config

        weights, yaml = work / "detector.pth", work / "detector.yaml"
        if not weights.exists():
            fpn, head, *_ = cls.sizes[device]
            yaml.write_text(
                f"_BASE_: {ROOT}/configs/Digits/Base-Digits.yaml\nMODEL:\n  RESNETS: {{DEPTH: 50}}\n"
                f"  FPN: {{OUT_CHANNELS: {fpn}}}\n  ROI_BOX_HEAD: {{FC_DIM: {head}}}\n"
            )
            torch.manual_seed(0)
            iteration = build_iteration(read_config(str(yaml), ["MODEL.DEVICE", device, "DATALOADER.NUM_WORKERS", "0"]))
            model = iteration.model
            nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.1)  # else all classes are alike
            see_data(model, lambda: [model.backbone(model.preprocess_image(b).tensor) for b in iteration.batches])
            torch.save({"model": model.state_dict()}, weights)
        return weights

    def step(self) -> None:
        torch.manual_seed(self.iteration.storage.iter)  # proposals are sampled at random
        self.iteration()

    def logits(self) -> dict[str, Tensor]:
        """The logits of both on the labelled boxes of a batch."""
        model, batch = self.model, self.iteration.batches[0]
        boxes = [item["instances"].gt_boxes.to(model.device) for item in batch]
        heads, features = model.roi_heads, model.backbone(model.preprocess_image(batch).tensor)
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        (teacher,) = model.teacher.view(batch, model.input_format).box_logits([boxes])
        return {"student": heads.box_predictor(heads.box_head(pooled))[0], "teacher": teacher}


class ClassifierRun:
    """Training steps of a classifier under `words` of config, on four batches in memory."""

    config = ROOT / "configs/Digits/cls_dkd.yaml"
    sizes = {"cuda": (32, 256), "cpu": (16, 16)}  # pixels, images

    def __init__(self, words: list[str], device: str, lr: str, work: Path) -> None:
        from kd_cls.build import build_trainer
        from kd_cls.checks import check_config
        from kd_cls.config import load_cfg
        from kd_cls.distributed import Process

        pixels, images = self.sizes[device]
        common = f"DEVICE {device} OUTPUT_DIR {work} MODEL.NAME cifar_resnet8x4 KD.TEACHER.NAME cifar_resnet32x4"
        common += f" DATA.INPUT_SIZE {pixels} DATA.TRAIN_IMAGES {4 * images} SOLVER.IMS_PER_BATCH {images}"
        common += f" DATA.AUGMENTATION none KD.TEACHER.ALLOW_RANDOM True KD.LOSS.WARMUP_EPOCHS 0 SOLVER.BASE_LR {lr}"
        common += " SOLVER.SCHEDULE.NAME constant SOLVER.EPOCHS 1e6"
        cfg = load_cfg(str(self.config), ["KD.TEACHER.CONFIG_FILE", "", *common.split(), *words])
        process = Process(torch.device(device))
        check_config(cfg, process)
        self.trainer = build_trainer(cfg, process)
        self.task = self.trainer.task.train()
        self.model = self.task.trainable_module
        self.batches = [(images.clone(), target.clone()) for images, target in self.trainer.loaders.train]
        teacher = self.task.teacher
        see_data(teacher.model, lambda: [teacher.plain(images) for images, _ in self.batches])
        teacher.model.eval()

    def step(self) -> None:
        images, target = self.batches[self.trainer.iteration % len(self.batches)]
        self.trainer.step(images, target, 0, torch.arange(len(images)))

    @property
    def loss(self) -> float:
        """Of the last step."""
        return self.trainer.meters.read(world_size=1)["loss"]

    def logits(self) -> dict[str, Tensor]:
        images = self.batches[0][0].contiguous(memory_format=self.trainer.memory_format)
        return {"student": (self.task.compiled_student or self.model)(images)[0], "teacher": self.task.teacher(images)}


RUNS = {"detector": DetectorRun, "classifier": ClassifierRun}
Run = DetectorRun | ClassifierRun


@torch.no_grad()
def see_data(model: nn.Module, forward: Callable[[], object]) -> None:
    """Set the statistics of batch norms to the mean over `forward`'s batches."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    forward()


@dataclass
class Trace:
    """What a training has to show: logits before it, the loss of every step, weights before and after."""

    logits: dict[str, Tensor]
    losses: list[float]
    start: Tensor
    end: Tensor


def trace(run: Run, steps: int, nudge: bool = False) -> Trace:
    """Train; with `nudge` from weights that differ by a millionth, about as much as two kernels' results."""
    if nudge:
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(1 + 1e-6 * torch.randn_like(parameter))
    logits = {name: tensor.detach().float().cpu() for name, tensor in run.logits().items()}
    start, losses = flat_weights(run.model), []
    for _ in range(steps):
        run.step()
        losses.append(float(run.loss))
    return Trace(logits, losses, start, flat_weights(run.model))


def flat_weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().cpu().flatten() for p in model.parameters() if p.requires_grad])


@dataclass
class Differences:
    """Between two traces.

    Args:
        logits: the largest difference in units of their standard deviation, of student or teacher.
        first_loss: relative, of the first step.
        losses: relative, the largest over all steps.
        weights: of the last step, relative to how far they have moved.
    """

    logits: float
    first_loss: float
    losses: float
    weights: float

    @classmethod
    def between(cls, a: Trace, b: Trace) -> "Differences":
        logits = max(float((a.logits[k] - z).abs().max() / z.std()) for k, z in b.logits.items())
        losses = [abs(x - y) / abs(y) for x, y in zip(a.losses, b.losses, strict=True)]
        moved = (b.end - b.start).norm()
        finite = all(math.isfinite(loss) for loss in losses)  # max() may pass over a NaN
        return cls(logits, losses[0], max(losses) if finite else math.nan, float((a.end - b.end).norm() / moved))

    def within(self, limits: Limits, noise: "Differences") -> bool:
        """Whether rounding explains them; False for NaN."""
        at_once = self.logits <= limits.logits and self.first_loss <= limits.first_loss
        apart = zip((self.losses, self.weights), (noise.losses, noise.weights), strict=True)
        return at_once and all(ours <= max(limits.later, 10 * theirs) for ours, theirs in apart)


def compare(row: Row, device: str, steps: int, work: Path) -> tuple[Differences, Differences]:
    """Fast beside slow, and a nudged slow run beside slow; the slow ones are kept in `work` for other rows."""

    def traced(words: list[str], nudge: bool = False) -> Trace:
        lr = {"detector": "0.002", "classifier": "0.01"}[row.network]
        return trace(RUNS[row.network](words, device, lr, work), steps, nudge)

    def kept(name: str, *arguments: Any) -> Trace:
        path = work / f"{name.replace(' ', '_')}.pt"
        if not path.exists():
            torch.save(asdict(traced(*arguments)), path)
        return Trace(**torch.load(path))

    # Among the slow values only FOLD_BN's is not the default.
    slow = [row.key, row.off] if row.key == "KD.TEACHER.FOLD_BN" else []
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        plain = kept(" ".join([row.network, *slow]), slow)
        nudged = kept(" ".join([row.network, *slow, "nudged"]), slow, True)
        fast = traced([row.key, row.on])
    return Differences.between(fast, plain), Differences.between(nudged, plain)


def amp_dtype() -> str:
    """The 16-bit type that this GPU computes in."""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def gain(row: Row, device: str, rounds: int, work: Path, precision: str) -> dict[str, float]:
    """Slow step / fast step over pairs, after eight of each: the `median` and the lower quartile, `low`; and the median
    seconds of a slow step, `slow`.
    """
    torch.backends.cudnn.benchmark = row.network == "classifier"  # as the two packages train
    amp = [] if precision == "float32" else ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", precision]
    slow, fast = (RUNS[row.network]([row.key, value, *amp], device, "0.0", work) for value in (row.off, row.on))

    def timed(run: Run) -> float:
        start = time.perf_counter()
        run.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(min(rounds, 8)):  # cuDNN chooses, dynamo compiles, a graph is captured
        timed(slow), timed(fast)
    pairs = [(timed(slow), timed(fast)) for _ in range(rounds)]
    ratios = [one / other for one, other in pairs]
    low = statistics.quantiles(ratios, n=4)[0] if rounds > 1 else ratios[0]
    return {"median": statistics.median(ratios), "low": low, "slow": statistics.median(one for one, _ in pairs)}


class Warnings(logging.Handler):
    """Remembers what our packages warn of: a fast path that falls back says so."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        for name in ("kd_core", "kd_det", "kd_cls"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if "ALLOW_RANDOM" not in record.getMessage():
            self.messages.append(record.getMessage())


def measure(row: Row, device: str, steps: int, rounds: int, work: Path) -> dict[str, Any]:
    """What a row's process finds: differences and gains, or why there are none."""
    warned = Warnings()
    try:
        differences, noise = compare(row, device, steps, work)
        found = {"differences": asdict(differences), "noise": asdict(noise), "gains": {}}
        for precision in ("float32", amp_dtype())[: 2 if device == "cuda" else 1]:
            found["gains"][precision] = gain(row, device, rounds, work, precision)
    except Exception as error:  # whatever a fast path may raise is what is to be found out
        return {"error": f"{type(error).__name__}: {one_line(error)}"}
    return found if not warned.messages else {"error": f"falls back: {warned.messages[0][:200]}"}


def in_own_process(row: Row, options: argparse.Namespace, work: Path, seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own: a CUDA error would spoil every row after it."""
    words = ["--device", options.device, "--steps", str(options.steps), "--rounds", str(options.rounds)]
    command = [sys.executable, str(Path(__file__).resolve()), *words, "--work", str(work), "--row", row.name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return {"skipped": f"not finished: {TIME_WAS_UP}"}
    *_, last = done.stdout.splitlines() or [""]
    if done.returncode == 0 and last.startswith("{"):
        return json.loads(last)
    *_, reason = done.stderr.strip().splitlines() or ["no message"]
    return {"error": f"exit status {done.returncode}: {reason[:200]}"}


def verdict(row: Row, found: dict[str, Any]) -> str:
    """A row's result in words."""
    if "error" in found or "skipped" in found:
        return found.get("skipped") or f"fails: {found['error']}"
    if not Differences(**found["differences"]).within(row.limits, Differences(**found["noise"])):
        return "differs"
    worth = [name for name, gain in found["gains"].items() if gain["median"] >= WORTH and gain["low"] > 1]
    return f"safe, worth it in {' and '.join(worth)}" if worth else "safe, no gain"


def cells(row: Row, found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    if "differences" not in found:
        return [row.name, "", "", "", "", verdict(row, found)]
    ours, noise = found["differences"], found["noise"]
    gains = [f"{gain['median']:.2f} {name} ({1e3 * gain['slow']:.0f} ms)" for name, gain in found["gains"].items()]
    pairs = [f"{ours[name]:.1e} ({noise[name]:.1e})" for name in ("losses", "weights")]
    return [row.name, f"{ours['logits']:.1e}", *pairs, ", ".join(gains), verdict(row, found)]


def run_tests(seconds: float) -> str:
    """The tests that need CUDA: pytest's last line, and above it those that fail."""
    words = ["-m", "gpu", "-n0", "-rfE", "--continue-on-collection-errors"]  # of examples whose packages are absent
    command = [sys.executable, "-m", "pytest", *words, str(ROOT / "tests")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    except subprocess.TimeoutExpired:
        return f"not finished: {TIME_WAS_UP}"
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    *_, last = done.stdout.strip().splitlines() or [f"pytest ends with status {done.returncode}"]
    return "\n".join([*lines, last]) if done.returncode == 0 else "\n".join([*lines, f"fails: {last}"])


def machine(device: str) -> str:
    """What the figures are of."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT).stdout
    name = torch.cuda.get_device_name() if device == "cuda" else f"the CPU ({torch.get_num_threads()} threads)"
    return f"{name}, torch {torch.__version__}, commit {commit.strip() or 'unknown'}, seed 0"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="time limit (default: %(default)s)")
    told = "the rows whose name has one of these words (quote a whole name), also on a CPU; no tests"
    parser.add_argument("--only", nargs="+", metavar="WORD", help=told)
    parser.add_argument("--steps", type=count, default=20, help="training steps to compare (default: %(default)s)")
    parser.add_argument("--rounds", type=count, default=20, help="pairs of steps that are timed (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a self-test of this tool")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.row:
        row = next(row for row in ROWS if row.name == options.row)
        print(json.dumps(measure(row, options.device, options.steps, options.rounds, options.work)))
        return 0
    rows = [row for row in ROWS if not options.only or any(word in row.name for word in options.only)]
    for word in options.only or ():
        if not any(word in row.name for row in ROWS):
            raise UserError(f"--only {word}: no row has this word; rows: {', '.join(row.name for row in ROWS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("verify_gpu: torch finds no GPU here, so there is nothing to verify", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * options.minutes
    print(machine(options.device), flush=True)
    tests = "not run"
    if options.device == "cuda" and not options.only:
        tests = run_tests(0.4 * (end - time.monotonic()))
    print(f"tests that need CUDA: {tests}", flush=True)
    if options.device == "cpu" and not options.only:
        rows = [row for row in rows if not row.cuda_only]
    results: dict[Row, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as work:
        for row in rows:
            left = end - time.monotonic()
            late = {"skipped": f"not run: {TIME_WAS_UP}"}
            results[row] = in_own_process(row, options, Path(work), left) if left > 0 else late
            print(f"{row.name}: {verdict(row, results[row])}", flush=True)
    titles = ["", "logits", "losses (noise)", "weights (noise)", "slow step / fast step", ""]
    print("\n" + tabulate([cells(row, found) for row, found in results.items()], titles, tablefmt="github"))
    words = {row: verdict(row, found) for row, found in results.items()}
    print()
    for network in dict.fromkeys(row.network for row in rows):
        keys = [f"{row.key} {row.on}" for row, text in words.items() if row.network == network and "worth" in text]
        print(f"Safe and worth setting here for a {network}: {', '.join(keys) or 'none'}")
    if "fails" in tests or any(text.startswith(("fails", "differs")) for text in words.values()):
        return 1
    return 3 if any(TIME_WAS_UP in text for text in (tests, *words.values())) else 0


if __name__ == "__main__":
    sys.exit(exit_on_user_error("verify_gpu", main))
