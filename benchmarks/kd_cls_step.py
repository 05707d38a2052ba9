"""What a distilled classifier's training step costs:  python benchmarks/kd_cls_step.py [--peer DIR] [--json FILE]

ResNet-8x4 ← ResNet-32x4, 64 images of 32 px, 100 classes, float32, random weights, learning rate 0. Our networks run
channels last (MODEL.CHANNELS_LAST, KD.TEACHER.CHANNELS_LAST), which is opt-in. The sides take turns in one process on
the same batch; the figures are medians over the rounds.

    KD        against its floor: the teacher's forward pass, the student's and its backward pass, each alone
    DeepKD    (over KD, the paper's momenta) against KD, and against its floor: that of KD + a second backward pass
    DeepKD, its teacher in bfloat16: KD.TEACHER.DTYPE, for hardware that is fast at it
    MLKD      and CRLD, of two views of every image, against the papers' own
    all       against the papers' own steps (--peer: a checkout of DeepKD's released code, which is only read)

Exit code 1 where a bound does not hold.
"""

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from figures import parts_of_step, report_steps, step_options
from PIL import Image
from timing import by_turns, timed
from torch import nn
from torch.utils.data import Dataset

from kd_cls.build import build_trainer
from kd_cls.config import load_cfg
from kd_cls.data import register_dataset
from kd_cls.distributed import start_process
from kd_cls.engine.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
BATCH, CLASSES = 64, 100
BFLOAT16 = "DeepKD, its teacher in bfloat16"
# Upper bounds of KD over its floor, of DeepKD over our KD, and of DeepKD over the papers' DeepKD. KD should cost no
# more than the papers' KD, but that is an aim and no bound.
KD_BOUND, DEEPKD_BOUND, PAPERS_DEEPKD_BOUND = 1.05, 1.35, 0.75
TWO_VIEWS = ("MLKD", "CRLD")
PAPERS_TWO_VIEWS_BOUND = 0.7
Side = Callable[[], object]


class Noise(Dataset):
    """One batch of random images, each of a random class."""

    classes = [str(number) for number in range(CLASSES)]
    transform = None

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels = np.random.default_rng(index).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        return (image if self.transform is None else self.transform(image)), index

    def __len__(self) -> int:
        return BATCH


@register_dataset("noise", augmentation="none")
def noise(root: Path, download: bool) -> tuple[Dataset, Dataset]:
    return Noise(), Noise()


class Step:
    """The training step of a config of configs/CIFAR100 on one batch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.task = trainer, trainer.task.train()
        self.images, self.target = next(iter(trainer.loaders.train))
        self.indices = trainer.loaders.train.sampler.order(0)

    def __call__(self) -> None:
        self.trainer.step(self.images, self.target, 0, self.indices)

    def teacher_forward(self) -> object:
        return self.task.teacher(self.images)

    def student_forward(self) -> object:
        return self.task.trainable_module(self.images)

    def student_backward(self) -> float:
        """Seconds of a backward pass alone, from the cross-entropy."""
        self.trainer.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.student_forward()[0], self.target)
        seconds = timed(loss.backward)
        self.trainer.optimizer.zero_grad()
        return seconds

    student_backward.times_itself = True


def step_of(method: str, output: str, more: str = "") -> Step:
    """Our step of `method`, from its config with `more` keys and values."""
    words = f"OUTPUT_DIR {output} DATA.NAME noise DATA.AUGMENTATION none DATA.NUM_WORKERS 0"
    words += " SOLVER.BASE_LR 0 SOLVER.EPOCHS 1e6 MODEL.CHANNELS_LAST True KD.TEACHER.CHANNELS_LAST True"
    words += " KD.TEACHER.CONFIG_FILE  KD.TEACHER.NAME cifar_resnet32x4 KD.TEACHER.ALLOW_RANDOM True"
    cfg = load_cfg(str(ROOT / f"configs/CIFAR100/{method}_resnet32x4_resnet8x4.yaml"), words.split(" ") + more.split())
    with start_process(cfg.DEVICE) as process:
        return Step(build_trainer(cfg, process))


def papers_steps(peer: Path, ours: Step) -> dict[str, Side]:
    """One step of the released code's KD and one of its DeepKD, with its own losses and optimizer."""
    sys.path.insert(0, str(peer))
    networks, distillers = load(peer, "mdistiller/models/cifar/resnet.py"), load(peer, "mdistiller/distillers/KD.py")
    optimizers = load(peer, "mdistiller/engine/deepkd.py")
    device = ours.images.device

    def distiller(trainer: str) -> nn.Module:
        deepkd = SimpleNamespace(ALPHA=1.0, BETA=1.0, WARMUP_FACTOR=1.0, DKD=False, TOPK=0)
        cfg = SimpleNamespace(
            KD=SimpleNamespace(TEMPERATURE=4.0, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
            EXPERIMENT=SimpleNamespace(LOGIT_STAND=False),
            SOLVER=SimpleNamespace(TRAINER=trainer, DEEPKD=deepkd),
        )
        networks_of = (networks.resnet8x4(num_classes=CLASSES), networks.resnet32x4(num_classes=CLASSES))
        return distillers.KD(*networks_of, cfg).to(device).train()

    kd, deepkd = distiller("base"), distiller("deepkd")
    sgd = torch.optim.SGD(kd.get_learnable_parameters(), 0.0, momentum=0.9, weight_decay=5e-4)
    streams = optimizers.DEEPKDTrainer(
        deepkd.get_learnable_parameters(), 0.0, momentum_tog=0.975, momentum_tcg=0.825, momentum_ncg=0.975,
        weight_decay=5e-4,
    )  # fmt: skip

    def kd_step() -> None:
        sgd.zero_grad()
        _, losses = kd(image=ours.images, target=ours.target, epoch=1)
        sum(loss.mean() for loss in losses.values()).backward()
        sgd.step()

    def deepkd_step() -> None:
        _, losses = deepkd(image=ours.images, target=ours.target, epoch=1)
        for term, collect in (("nckd", streams.step_ncg), ("tckd", streams.step_tcg), ("task", streams.step)):
            streams.zero_grad(set_to_none=True)
            losses[f"loss_{term}"].mean().backward(retain_graph=term != "task")
            collect()

    return {"the papers' KD": kd_step, "the papers' DeepKD": deepkd_step}


def papers_two_views(peer: Path, method: str, ours: Step) -> Side:
    """One step of the released code's MLKD or CRLD on the two views that ours has."""
    sys.modules.setdefault("turtle", SimpleNamespace(st=None))  # imported there, and never used
    networks = load(peer, "mdistiller/models/cifar/resnet.py")
    distillers = load(peer, f"mdistiller/distillers/{method}.py")
    cfg = SimpleNamespace(
        KD=SimpleNamespace(TEMPERATURE=4.0, LOSS=SimpleNamespace(CE_WEIGHT=0.1, KD_WEIGHT=0.9)),
        CRLD=SimpleNamespace(CE_WEIGHT=1.0, WV_WEIGHT=2.0, CV_WEIGHT=0.5, TEMPERATURE=4.0, TAU_W=0.9, TAU_S=0.2),
        EXPERIMENT=SimpleNamespace(LOGIT_STAND=False),
        SOLVER=SimpleNamespace(
            TRAINER="base", DEEPKD=SimpleNamespace(ALPHA=1.0, BETA=1.0, WARMUP_FACTOR=1.0, DKD=False, TOPK=0)
        ),
    )
    student, teacher = networks.resnet8x4(num_classes=CLASSES), networks.resnet32x4(num_classes=CLASSES)
    model = getattr(distillers, method)(student, teacher, cfg).to(ours.target.device).train()
    sgd = torch.optim.SGD(model.get_learnable_parameters(), 0.0, momentum=0.9, weight_decay=5e-4)
    weak, strong = (view.contiguous() for view in ours.images.chunk(2, dim=1))

    def step() -> None:
        sgd.zero_grad()
        _, losses = model(image_weak=weak, image_strong=strong, target=ours.target, epoch=1)
        sum(loss.mean() for loss in losses.values()).backward()
        sgd.step()

    return step


def load(peer: Path, file: str) -> ModuleType:
    """A module of the released code under its own name, without the packages' __init__, which import much more."""
    name = file.removesuffix(".py").replace("/", ".")
    package = name.rpartition(".")[0]
    if package not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str((peer / file).parent)]
    spec = importlib.util.spec_from_file_location(name, peer / file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table_rows(seconds: dict[str, list[float]]) -> list[list[Any]]:
    """[name, ours in ms, the reference in ms, median ratio over the rounds, bound] of each pair."""
    parts = [seconds[name] for name in ("teacher forward", "student forward", "student backward")]
    floor = [sum(part) for part in zip(*parts, strict=True)]
    pairs = [
        ("KD / floor", seconds["KD"], floor, KD_BOUND),
        ("DeepKD / KD", seconds["DeepKD"], seconds["KD"], DEEPKD_BOUND),
        ("DeepKD / floor", seconds["DeepKD"], [f + b for f, b in zip(floor, parts[2], strict=True)], None),
    ]
    if "the papers' KD" in seconds:
        pairs += [
            ("DeepKD / the papers' DeepKD", seconds["DeepKD"], seconds["the papers' DeepKD"], PAPERS_DEEPKD_BOUND),
            ("DeepKD / the papers' KD", seconds["DeepKD"], seconds["the papers' KD"], None),
            (f"{BFLOAT16} / the papers' KD", seconds[BFLOAT16], seconds["the papers' KD"], None),
            ("KD / the papers' KD", seconds["KD"], seconds["the papers' KD"], None),
        ]
        for method in TWO_VIEWS:
            papers = seconds[f"the papers' {method}"]
            pairs.append((f"{method} / the papers' {method}", seconds[method], papers, PAPERS_TWO_VIEWS_BOUND))
    return [
        [name, *(1e3 * statistics.median(side) for side in sides), statistics.median(map(ratio, *sides)), bound]
        for name, *sides, bound in pairs
    ]


def ratio(ours: float, other: float) -> float:
    return ours / other


def main() -> int:
    parser = step_options(__doc__, "kd_cls_step", peer="DeepKD's released code")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as output:
        kd, deepkd = (step_of(method, output) for method in ("kd", "deepkd_kd"))
        sides: dict[str, Side] = {
            "KD": kd,
            "DeepKD": deepkd,
            BFLOAT16: step_of("deepkd_kd", output, "KD.TEACHER.DTYPE bfloat16"),
            "teacher forward": kd.teacher_forward,
            "student forward": kd.student_forward,
            "student backward": kd.student_backward,
        }
        two_views = {method: step_of(method.lower(), output) for method in TWO_VIEWS}
        sides |= two_views
        if options.peer is not None:
            sides |= papers_steps(options.peer, kd)
            sides |= {
                f"the papers' {name}": papers_two_views(options.peer, name, step) for name, step in two_views.items()
            }
        seconds = by_turns(sides, options.rounds)
    rows = table_rows(seconds)
    parts = {name: seconds[name] for name in ("teacher forward", "student forward", "student backward")}
    parts["second backward"] = seconds["student backward"]  # from the same logits through the same network
    return report_steps(seconds, rows, options.json, parts_of_step(seconds["DeepKD"], parts))


if __name__ == "__main__":
    sys.exit(main())
