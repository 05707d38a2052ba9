"""How cost grows with the work:  python benchmarks/growth.py [--quick] [--plot FILE] [--json FILE]

    losses      forward and backward: 10 … 21,841 classes at 256 rows, and 1 … 65,536 rows of 81 classes
    StreamSGD   a step with two sets: 1 M … 300 M parameters in tensors of ResNet-50's shapes; its memory is that of
                gradients, their sum and buffers

Time is a median; memory is the peak of torch's allocator. The slope over the last decade, in logarithms, is judged: 1
is linear. Small sizes are not judged, because the overhead of a call dominates there. Exit code 1 if growth is faster
than its bound.

On the CPU glibc is set to keep freed memory, as torch's CUDA allocator does. Otherwise it may return blocks of tens of
MiB to the system, and mapping fresh pages then costs more than the loss that is computed in them.
"""

import ctypes
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from core import logits, with_backward
from figures import OUTPUT, Bound, Table, judged, options, write_figures
from timing import by_turns, peak_bytes, timed
from torch import nn

from kd_core.losses import AEKTLoss, DKDLoss, GDKDLoss, KDLoss
from kd_core.optim import StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams
from kd_core.topk import TopKSchedule

TIME_SLOPE, MEMORY_SLOPE = 1.15, 1.05
CLASSES = (10, 30, 100, 300, 1000, 2184, 6900, 21841)
ROWS = (1, 4, 16, 64, 256, 1024, 2048, 6554, 16384, 65536)
PARAMETERS = tuple(round(n * 1e6) for n in (1, 3, 10, 30, 100, 300))
FIXED_ROWS, FIXED_CLASSES = 256, 81  # a batch; COCO's classes and the background
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)
BYTES_PER_PARAMETER = 24  # float32: itself, two gradients and their sum, two buffers
LOSSES = {
    "KD": KDLoss(),
    "DKD": DKDLoss(),
    "DKD, top-k": DKDLoss(topk=TopKSchedule(0.5, 0.5)),
    "GDKD": GDKDLoss(),
    "AEKT": AEKTLoss(),
}
AXES = {"classes": "classes C", "rows": "rows N", "parameters": "parameters"}


@dataclass
class Curve:
    """Seconds and bytes of one thing at growing sizes."""

    name: str
    axis: str
    sizes: list[int]
    seconds: list[float]
    bytes: list[int]


def last_slope(sizes: list[int], values: list[float]) -> float:
    """Slope, by least squares in logarithms, over the sizes within a decade of the largest.

    Raises:
        ValueError: fewer than two such sizes.
    """
    points = [(math.log(n), math.log(v)) for n, v in zip(sizes, values, strict=True) if 10 * n >= 0.99 * max(sizes)]
    if len(points) < 2:
        raise ValueError(f"sizes {sizes} have fewer than two within a decade of the largest: there is no slope")
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def keep_freed_memory() -> None:
    """Let glibc keep freed memory; no effect with other C libraries."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def loss_curves(axis: str, sizes: tuple[int, ...], rounds: int, device: str) -> Iterator[Curve]:
    """Every loss over `axis`; its sizes take turns."""
    for name, loss in LOSSES.items():
        steps = {str(n): loss_step(loss, *shape(axis, n), device) for n in sizes}
        memory = [peak_bytes(step) for step in steps.values()]
        seconds = [statistics.median(times) for times in by_turns(steps, rounds).values()]
        yield Curve(name, axis, list(sizes), seconds, memory)


def shape(axis: str, size: int) -> tuple[int, int]:
    return (FIXED_ROWS, size) if axis == "classes" else (size, FIXED_CLASSES)


def loss_step(loss: nn.Module, rows: int, classes: int, device: str) -> Callable[[], None]:
    student, teacher, target = logits(rows, classes, device)
    return with_backward(lambda: sum(loss(student, teacher, target, 0.0).values()), student)


def optimizer_curve(sizes: tuple[int, ...], rounds: int, device: str) -> Curve:
    """StreamSGD's step, one size after the other, because all at once would not fit in memory."""
    curve = Curve("StreamSGD, 2 sets", "parameters", [], [], [])
    for count in sizes:
        if BYTES_PER_PARAMETER * count > 0.9 * free_bytes(device):
            print(f"From {count / 1e6:.0f} M parameters on left out: {free_bytes(device) / 2**30:.1f} GiB are free")
            break
        params = realistic_parameters(count, device)
        optimizer = deepkd_sgd(params, 1e-6)
        memory = peak_bytes(lambda params=params, optimizer=optimizer: first_step(params, optimizer))
        optimizer.step()  # one more that does not count
        seconds = statistics.median(timed(optimizer.step) for _ in range(rounds))
        curve.sizes.append(count), curve.seconds.append(seconds), curve.bytes.append(memory)
    return curve


def first_step(params: list[nn.Parameter], optimizer: StreamSGD) -> None:
    """Fill the gradients of both sets and create the buffers."""
    backward_streams({"tog": sum(p.sum() for p in params), "tcg": sum(p.sum() for p in params)}, optimizer)
    optimizer.step()


def realistic_parameters(count: int, device: str) -> list[nn.Parameter]:
    """`count` parameters in tensors of ResNet-50's shapes, repeated as needed; the last one is cut."""
    with torch.device("meta"):
        shapes = [p.shape for p in torchvision.models.resnet50().parameters()]
    params = []
    for size in itertools.cycle(shapes):
        size = size if size.numel() < count else torch.Size([count])
        params.append(nn.Parameter(torch.full(size, 0.1, device=device)))
        count -= size.numel()
        if count == 0:
            return params
    raise AssertionError


def free_bytes(device: str) -> int:
    """Available memory; infinite if the system does not report it."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2**63


def measure(sizes: dict[str, tuple[int, ...]], parameters: tuple[int, ...], rounds: int, device: str) -> list[Curve]:
    """The losses' curves over every axis of `sizes`, and the optimizer's over `parameters`."""
    if device == "cpu":
        keep_freed_memory()
    curves = [curve for axis, of_axis in sizes.items() for curve in loss_curves(axis, of_axis, rounds, device)]
    return [*curves, optimizer_curve(parameters, rounds, device)]


def table(curves: list[Curve]) -> Table:
    """Cost of the largest size, and the slopes there."""
    rows = [
        [
            curve.name, AXES[curve.axis], f"{curve.sizes[0]:,} … {curve.sizes[-1]:,}",
            1e3 * curve.seconds[-1], curve.bytes[-1] / 2**20,
            *(judged(bound.found, bound.bound) for bound in bounds(curve)),
        ]
        for curve in curves
    ]  # fmt: skip
    headers = ["", "over", "from … to", "ms at the end", "MiB at the end", "slope of time", "slope of memory"]
    return Table(headers, rows)


def bounds(curve: Curve) -> list[Bound]:
    name = f"{curve.name} over {AXES[curve.axis]}"
    return [
        Bound(f"{name}, time", last_slope(curve.sizes, curve.seconds), TIME_SLOPE),
        Bound(f"{name}, memory", last_slope(curve.sizes, curve.bytes), MEMORY_SLOPE),
    ]


def plot(curves: list[dict[str, Any]], path: Path) -> None:
    """Time and memory over each axis, in logarithms, with a line of slope 1 for comparison.

    Args:
        curves: as in the JSON file.
        path: a picture, written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from kd_core.utils.files import write_whole

    figure, panels = pyplot.subplots(2, len(AXES), figsize=(11, 6), sharex="col", layout="constrained")
    for column, (axis, label) in zip(panels.T, AXES.items(), strict=True):
        shown = [curve for curve in curves if curve["axis"] == axis]
        for panel, key, unit in zip(column, ("seconds", "bytes"), (1e3, 1 / 2**20), strict=True):
            for curve in shown:
                panel.loglog(curve["sizes"], [unit * value for value in curve[key]], marker=".", label=curve["name"])
            if shown:
                sizes, end = shown[0]["sizes"][-4:], 3 * unit * max(curve[key][-1] for curve in shown)
                panel.loglog(sizes, [end * n / sizes[-1] for n in sizes], "k:", linewidth=1, label="slope 1")
            panel.grid(alpha=0.3)
        column[1].set_xlabel(label)
        if shown:
            column[0].legend(fontsize=8)
    panels[0, 0].set_ylabel("milliseconds"), panels[1, 0].set_ylabel("MiB")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)


def main() -> int:
    parser = options(__doc__, "growth")
    parser.add_argument("--quick", action="store_true", help="small sizes, once: that it runs, not what it costs")
    parser.add_argument("--rounds", type=int, default=11, help="repetitions of every size that count")
    parser.add_argument("--plot", type=Path, default=OUTPUT / "growth.png")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rounds = 1 if args.quick else args.rounds
    classes, rows, parameters = (sizes[:4] if args.quick else sizes for sizes in (CLASSES, ROWS, PARAMETERS))
    curves = measure({"classes": classes, "rows": rows}, parameters[:2] if args.quick else parameters, rounds, device)
    result = table(curves)
    kept = [asdict(curve) for curve in curves]
    print(result)
    plot(kept, args.plot)
    judged_bounds = [] if args.quick else [bound for curve in curves for bound in bounds(curve)]
    return write_figures(args.json, {"slopes": result}, judged_bounds, curves=kept)


if __name__ == "__main__":
    raise SystemExit(main())
