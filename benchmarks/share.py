"""The share of the distillation loss in a training step:  python benchmarks/share.py [--rounds N] [--json FILE]

Compares the forward and backward pass of the loss alone, on the logits of a step, with the whole step of the same
config: kd_cls's ResNet-8x4 ← ResNet-32x4 (kd_cls_step.py) and kd_det's ResNet-18 ← ResNet-50 (kd_det_step.py). Exit
code 1 if a loss takes more than 1 % of its step.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import kd_cls_step
import kd_det_step
import torch
from figures import Bound, Table, judged, options, write_figures
from timing import by_turns
from torch import Tensor, nn

BOUND = 0.01
CLASSIFICATION = {"KD": "kd", "DKD": "dkd", "GDKD": "gdkd", "AEKT": "aekt", "DeepKD": "deepkd"}
DETECTION = {"KD": "kd", "DKD": "dkd", "GDKD": "gdkd", "AEKT": "aekt", "DeepKD (top-k)": "deepkd"}
Step = Callable[[], object]


def steps(output: str) -> Iterator[tuple[str, Step, nn.Module]]:
    """(name, one step, its loss) of every config."""
    for name, method in CLASSIFICATION.items():
        step = kd_cls_step.step_of(method, output)
        yield f"kd_cls, {name}", step, step.task.distillation
    for name, config in DETECTION.items():
        iteration = kd_det_step.iteration_of(config)
        yield f"kd_det, {name}", iteration, iteration.model.loss


def loss_alone(loss: nn.Module, step: Step) -> tuple[Step, str]:
    """Forward and backward of `loss` with the arguments that `step` passes to it, and the size of its logits."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = loss.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    try:
        step()
    finally:
        handle.remove()
    (student, *others), kwargs = calls[0]
    student = student.detach().requires_grad_()
    others = [other.detach() if isinstance(other, Tensor) else other for other in others]

    def alone() -> None:
        student.grad = None
        sum(loss(student, *others, **kwargs).values()).backward()

    return alone, "{} × {}".format(*student.shape)


def measure(name: str, step: Step, loss: nn.Module, rounds: int) -> list[Any]:
    """[name, size, ms of the loss, ms of the step, median share over the rounds]."""
    alone, size = loss_alone(loss, step)
    seconds = by_turns({"loss": alone, "step": step}, rounds)
    share = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return [name, size, *(1e3 * statistics.median(times) for times in seconds.values()), share]


def main() -> int:
    parser = options(__doc__, "share")
    parser.add_argument("--rounds", type=int, default=15, help="steps of every config that count")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as output:
        rows = [measure(*of_config, args.rounds) for of_config in steps(output)]
    bounds = [Bound(f"loss / step, {name}", share, BOUND) for name, *_, share in rows]
    cells = [[*row, judged(share, BOUND, digits=4)] for *row, share in rows]
    table = Table(["", "rows × classes", "loss, ms", "step, ms", "share (bound)"], cells)
    print(table)
    return write_figures(args.json, {"shares": table}, bounds)


if __name__ == "__main__":
    raise SystemExit(main())
