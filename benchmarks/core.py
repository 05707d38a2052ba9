"""What kd_core costs, beside what it replaces:  python benchmarks/core.py [--only losses] [--json FILE]

Losses: forward and backward against a plain transcription of the same formula (transcriptions.py), at the sizes of a
detector's ROI head, of ImageNet, of LVIS and of ImageNet-21k; and compiled, beside themselves. Vocabulary: the same of
a language model's logits, by chunks of rows, with KD beside F.kl_div. Optimizers: one update of a network's parameters.
Exit code 1 where a bound does not hold.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import transcriptions
from core_optim import optimizers
from figures import options, write_figures
from timing import Comparison, Step, alternate, comparison_table, peak_bytes
from torch import Tensor

from kd_core.losses import AEKTLoss, DistillationLoss, DKDLoss, ForegroundBackground, GDKD3Loss, GDKDLoss, KDLoss
from kd_core.topk import TopKSchedule

COMPILED_SIZES = [(512, 81), (64, 1000)]
SIZES = [(4096, 81), (256, 1000), (2048, 1204), (64, 21841)]
HALF = TopKSchedule(0.5, 0.5)
LOSSES = {
    "kd": KDLoss(),
    "dkd": DKDLoss(),
    "dkd_top1": DKDLoss(partition="teacher_top1"),
    "dkd_topk": DKDLoss(topk=HALF),
    "dkd_standardized": DKDLoss(standardize=True),
    "gdkd": GDKDLoss(),
    "gdkd_both": GDKDLoss(kl="both"),
    "gdkd_auto_k": GDKDLoss(k=20, auto_k=True),
    "gdkd3": GDKD3Loss(),
    "gdkds": ForegroundBackground(GDKD3Loss(), DKDLoss()),
    "aekt": AEKTLoss(),
}
VOCABULARY = 151_936  # of Qwen2 and its successors
VOCABULARY_ROWS = 32  # times and memory grow with the rows: 4,096 would need 40 GB for the transcriptions
CHUNK_ROWS = 4
TIME_BOUNDS = {"kd": 1.1}
TIME_BOUND, MEMORY_BOUND = 0.5, 0.7


def losses(device: str, seconds: float) -> Iterator[Comparison]:
    """Every loss at every size, beside its transcription, whose value it must give."""
    for rows, classes in SIZES:
        inputs = logits(rows, classes, device)
        for name in LOSSES:
            yield compare_loss(name, *inputs, seconds)


def vocabulary(device: str, seconds: float) -> Iterator[Comparison]:
    """Losses by chunks of rows over a language model's vocabulary; the transcriptions widen half precision first."""
    student, teacher, target = logits(VOCABULARY_ROWS, VOCABULARY, device)
    for dtype in (torch.float32, torch.bfloat16):
        inputs = student.detach().to(dtype).requires_grad_(), teacher.to(dtype), target
        for name in ("kd", "dkd", "gdkd", "aekt"):
            loss = copy.deepcopy(LOSSES[name])
            loss.chunk_rows = CHUNK_ROWS
            yield compare_loss(name, *inputs, seconds, loss)


def compare_loss(
    name: str, student: Tensor, teacher: Tensor, target: Tensor, seconds: float, loss: DistillationLoss | None = None
) -> Comparison:
    """Forward and backward of one loss, in time and in peak memory."""
    loss, transcription = loss or LOSSES[name], getattr(transcriptions, name)

    def ours() -> Tensor:
        return sum(loss(student, teacher, target, 0.0).values())

    def theirs() -> Tensor:
        return transcription(student.float(), teacher.float(), target)

    torch.testing.assert_close(ours(), theirs(), rtol=1e-3, atol=1e-5)
    steps = with_backward(ours, student), with_backward(theirs, student)
    times = alternate(*steps, seconds)
    memory = []
    for step in steps:
        student.grad = None
        memory.append(peak_bytes(step))
    bound = TIME_BOUNDS.get(name, TIME_BOUND)
    size = "{} × {}".format(*student.shape) + ("" if student.dtype == torch.float32 else " bfloat16")
    return Comparison(name, size, *times, bound, memory[0] / memory[1], MEMORY_BOUND)


def compiled(device: str, seconds: float) -> Iterator[Comparison]:
    """KD.LOSS.COMPILE beside the same loss without it; the first calls, which compile, do not count."""
    for rows, classes in COMPILED_SIZES:
        student, teacher, target = logits(rows, classes, device)

        def step_of(loss: DistillationLoss, inputs: tuple[Tensor, ...] = (student, teacher, target)) -> Step:
            return with_backward(lambda: sum(loss(*inputs, 0.0).values()), inputs[0])

        for name in ("kd", "dkd", "gdkd"):
            fast = copy.deepcopy(LOSSES[name])
            fast.compile()
            times = alternate(step_of(fast), step_of(LOSSES[name]), seconds)
            yield Comparison(f"{name} compiled", f"{rows} × {classes}", *times)


def logits(rows: int, classes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and target, with three rows in four of the last class, a detector's background."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, classes, generator=generator).mul(2).to(device)
    target = torch.randint(classes, (rows,), generator=generator)
    target[rows // 4 :] = classes - 1
    return student.requires_grad_(), teacher, target.to(device)


def with_backward(forward: Callable[[], Tensor], student: Tensor) -> Callable[[], None]:
    """One step of a loss: forward and backward into the student's logits."""

    def step() -> None:
        student.grad = None
        forward().backward()

    return step


SECTIONS = {"losses": losses, "vocabulary": vocabulary, "compiled": compiled, "optimizers": optimizers}


def main() -> int:
    parser = options(__doc__, "core")
    parser.add_argument("--only", choices=SECTIONS, help="measure one section")
    parser.add_argument("--seconds", type=float, default=1.0, help="time to spend on each comparison")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tables, bounds = {}, []
    for name in [args.only] if args.only else SECTIONS:
        comparisons = list(SECTIONS[name](device, args.seconds))
        tables[name] = comparison_table(comparisons)
        bounds += [bound for comparison in comparisons for bound in comparison.bounds]
        print(f"\n{name}, {device}\n\n{tables[name]}", flush=True)
    above = [bound for bound in bounds if not bound.holds]
    print(f"\n{len(bounds) - len(above)} of {len(bounds)} bounds hold; figures in {args.json}")
    return write_figures(args.json, tables, bounds)


if __name__ == "__main__":
    raise SystemExit(main())
