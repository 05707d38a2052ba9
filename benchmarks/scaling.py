"""What many GPUs cost:  python benchmarks/scaling.py [--seconds FORWARD BACKWARD … STEP --parameters N] [--json FILE]

1. Counted in two gloo processes: a rank sends (sets) × (trainable parameters) × 4 bytes a step.
2. Modelled: a step on n GPUs with the same images a GPU. Forward and backward passes, the filling of buckets and the
   optimizer's step are measured (on this machine, kd_det_step.py's ResNet-18 ← ResNet-50), or given by `--seconds`. A
   ring all-reduce of B bytes takes

       2 (n − 1) / n · B / bandwidth + 2 (n − 1) · latency

   Each set's buckets are sent, one after the other, once its backward pass is over (kd_core/distributed.py), so they
   travel while the next set's runs; of the last set's nothing is hidden: that is `exposed`. Beside it, what would be
   exposed if every bucket left as soon as its gradients are there, as DistributedDataParallel sends them. The model
   knows no stragglers and no contention. Bandwidth and latency are assumptions: give your own.

Exit code 1 where the count is another.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import bytes_sent
import torch
import torch.distributed as dist
from figures import Bound, Table, options, write_figures
from scaling_model import Link, Parts, scaling_table
from timing import timed

from kd_core.distributed import BUCKET_BYTES, SetReduction, make_buckets


def measured_parts(rounds: int) -> dict[str, Parts]:
    """The parts of kd_det_step.py's step with one, two and three sets, on this machine."""
    import kd_det_step

    three = ["SOLVER.DEEPKD.DELTA_NCG", "0.05"]  # another momentum for each stream, as most of the released configs
    iterations = {
        "KD, 1 set": kd_det_step.iteration_of("kd"),
        "DeepKD, 2 sets": kd_det_step.iteration_of("deepkd"),
        "DeepKD, 3 sets": kd_det_step.iteration_of("deepkd", three),
    }
    return {name: parts_of(iteration, rounds) for name, iteration in iterations.items()}


def parts_of(iteration: Any, rounds: int) -> Parts:
    """Medians over the rounds, after one that does not count."""
    from kd_det.engine.train_step import stream_losses

    model, optimizer = iteration.model, iteration.step.optimizer
    params = [p for p in model.parameters() if p.requires_grad]
    streams = model.loss.streams
    sets = getattr(optimizer, "stream_sets", None) or (("tog", "tcg", "ncg"),)
    seconds: list[list[float]] = []
    for _ in range(rounds + 1):
        losses: dict[str, Any] = {}
        forward = timed(lambda losses=losses: losses.update(iteration.recorded(lambda: model(iteration.batches[0]))))
        of_stream = stream_losses(losses, streams)
        of_set = [sum(of_stream[stream] for stream in names if stream in of_stream) for names in sets]
        passes = [set_pass(loss, params, keep=i < len(of_set) - 1) for i, loss in enumerate(of_set)]
        seconds.append([forward, *passes, filling(params)])
    forward, *backwards, fill = (statistics.median(column) for column in zip(*seconds[1:], strict=True))
    step = statistics.median(step_alone(iteration)() for _ in range(rounds))
    return Parts(forward, tuple(backwards), fill, step, bucket_bytes(params))


def set_pass(loss: torch.Tensor, params: list[torch.Tensor], keep: bool) -> float:
    """Seconds of one set's backward pass."""
    return timed(lambda: torch.autograd.grad(loss, params, allow_unused=True, retain_graph=keep))


def filling(params: list[torch.Tensor]) -> float:
    """Seconds that a set's gradients need into their buckets: a group of one process sends nothing."""
    gradient = {p: torch.ones_like(p) for p in params}
    reduction = SetReduction(params, 1)
    return timed(lambda: (reduction.start(0, gradient), reduction.finish([gradient])))


def step_alone(iteration: Any) -> Callable[[], float]:
    """One update of the optimizer with all gradients there; it returns its seconds."""
    from kd_det_step import stream_step

    optimizer = iteration.step.optimizer
    if hasattr(optimizer, "stream_sets"):
        return stream_step(iteration)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.zeros_like(p)
    return lambda: timed(optimizer.step)


def bucket_bytes(params: Sequence[torch.Tensor]) -> tuple[int, ...]:
    return tuple(sum(p.nbytes for p in bucket) for bucket in make_buckets(params, BUCKET_BYTES))


def given_parts(seconds: list[float], parameters: float) -> dict[str, Parts]:
    """Parts from the command line: FORWARD, a BACKWARD for every set, STEP.

    Raises:
        ValueError: fewer than three times, one below 0, or no parameters.
    """
    if len(seconds) < 3 or min(seconds) < 0 or parameters < 1:
        raise ValueError(
            f"--seconds {seconds} --parameters {parameters:g}: give FORWARD, a BACKWARD a set and STEP, none below 0, "
            "and the number of trainable parameters"
        )
    forward, *backwards, step = seconds
    full, rest = divmod(round(4 * parameters), BUCKET_BYTES)
    buckets = (BUCKET_BYTES,) * full + ((rest,) if rest else ())
    return {f"given, sets: {len(backwards)}": Parts(forward, tuple(backwards), 0.0, step, buckets)}


def byte_count() -> tuple[Table, list[Bound]]:
    """The counters of two processes beside (sets) × (trainable parameters) × 4."""
    trainable, sent = bytes_sent.count()
    rows, bounds = [], []
    for sets, of_ranks in sent.items():
        expected = sets * trainable * 4
        rows.append([sets, f"{trainable:,}", f"{expected:,}", *(f"{nbytes:,}" for nbytes in of_ranks)])
        worst = max(abs(nbytes - expected) for nbytes in of_ranks)
        bounds.append(Bound(f"bytes sent with {sets} sets beside sets × parameters × 4", float(worst), 0.0))
    ranks = [f"rank {rank} sent" for rank in range(bytes_sent.RANKS)]
    return Table(["sets", "trainable parameters", "sets × parameters × 4", *ranks], rows), bounds


def parse() -> argparse.Namespace:
    parser = options(__doc__, "scaling")
    parser.add_argument("--rounds", type=int, default=9, help="steps that count")
    parser.add_argument("--seconds", type=float, nargs="+", help="FORWARD, a BACKWARD for each set, STEP, of one GPU")
    parser.add_argument("--parameters", type=float, default=0, help="trainable ones, with --seconds")
    parser.add_argument("--faster", type=float, nargs="+", default=[1.0, 100.0], help="a GPU by this machine's speed")
    parser.add_argument("--nvlink", type=float, nargs=2, default=[300.0, 3.0], metavar=("GB/s", "µs"))
    parser.add_argument("--infiniband", type=float, nargs=2, default=[40.0, 5.0], metavar=("GB/s", "µs"))
    return parser.parse_args()


def parts_table(named: dict[str, Parts]) -> Table:
    """What goes into the model."""
    rows = []
    for name, parts in named.items():
        passes = " + ".join(f"{1e3 * seconds:.1f}" for seconds in parts.backwards)
        buckets = f"{sum(parts.buckets) / 1e6:.1f} in {len(parts.buckets)}"
        rows.append([name, 1e3 * parts.forward, passes, 1e3 * parts.fill, 1e3 * parts.step, buckets])
    return Table(["", "forward, ms", "backward, ms", "filling, ms a set", "optimizer, ms", "MB a set, buckets"], rows)


def main() -> int:
    args = parse()
    counted, bounds = byte_count()
    if args.seconds:
        named = given_parts(args.seconds, args.parameters)
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        named = measured_parts(args.rounds)
        dist.destroy_process_group()
    assumed = {"NVLink, up to 8 GPUs": args.nvlink, "InfiniBand, beyond": args.infiniband}
    links = [Link(1e9 * gigabytes, 1e-6 * microseconds) for gigabytes, microseconds in assumed.values()]
    tables = {
        "bytes": counted,
        "parts": parts_table(named),
        "assumed": Table(["assumed", "GB/s one way", "µs a hop"], [[name, *given] for name, given in assumed.items()]),
    }
    for factor in [1.0] if args.seconds else args.faster:
        faster = {name: parts.faster(factor) for name, parts in named.items()}
        tables[f"model_{factor:g}"] = scaling_table(faster, *links)
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")
    return write_figures(args.json, tables, bounds)


if __name__ == "__main__":
    raise SystemExit(main())
