"""A model of a training step on many GPUs, from the parts of a step on one. scaling.py says what it assumes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from figures import Table

GPUS = (1, 8, 64, 512)
NODE = 8  # GPUs that NVLink connects


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of one step on one GPU.

    forward: student, teacher, losses. backwards: of every set. fill: a set's gradients into buckets. step: the
    optimizer. buckets: their bytes.
    """

    forward: float
    backwards: tuple[float, ...]
    fill: float
    step: float
    buckets: tuple[int, ...]

    def faster(self, factor: float) -> "Parts":
        """The same step on a device that is `factor` times as fast."""
        backwards = tuple(seconds / factor for seconds in self.backwards)
        return replace(
            self, forward=self.forward / factor, backwards=backwards, fill=self.fill / factor, step=self.step / factor
        )


@dataclass(frozen=True)
class Link:
    """Bytes a second, one way, of a GPU in a ring, and seconds of one of its hops."""

    bandwidth: float
    latency: float


def all_reduce_seconds(nbytes: int, gpus: int, link: Link) -> float:
    """Of a ring."""
    return 2 * (gpus - 1) / gpus * nbytes / link.bandwidth + 2 * (gpus - 1) * link.latency


def exposed_seconds(parts: Parts, gpus: int, link: Link, bucket_by_bucket: bool = False) -> float:
    """Seconds between the last backward pass and the end of the last all-reduce.

    Args:
        bucket_by_bucket: each bucket leaves when its share of the backward pass is over; else all do at the pass's end.
    """
    if gpus == 1:
        return 0.0
    now = link_free = 0.0
    for backward in parts.backwards:
        compute = backward + parts.fill
        for number, nbytes in enumerate(parts.buckets, start=1):
            ready = now + compute * (number / len(parts.buckets) if bucket_by_bucket else 1)
            link_free = max(ready, link_free) + all_reduce_seconds(nbytes, gpus, link)
        now += compute
    bitmap = all_reduce_seconds(1, gpus, link)  # what each set reached; next to no bytes
    return max(link_free - now, 0.0) + bitmap


def step_seconds(parts: Parts, gpus: int, exposed: float) -> float:
    """A whole step; one GPU alone fills no buckets."""
    fill = parts.fill * len(parts.backwards) if gpus > 1 else 0.0
    return parts.forward + sum(parts.backwards) + fill + exposed + parts.step


def scaling_table(named: dict[str, Parts], nvlink: Link, infiniband: Link, gpus: Sequence[int] = GPUS) -> Table:
    """Every step on every number of GPUs. Efficiency: seconds on one GPU / seconds on n, with as many images a GPU."""
    rows = []
    for name, parts in named.items():
        alone = step_seconds(parts, 1, 0.0)
        for n in gpus:
            link = nvlink if n <= NODE else infiniband
            exposed = [exposed_seconds(parts, n, link, by_bucket) for by_bucket in (False, True)]
            seconds = [step_seconds(parts, n, of_way) for of_way in exposed]
            rows.append(
                [name, n, sum(parts.buckets) * len(parts.backwards) / 1e6 if n > 1 else 0.0]
                + [1e3 * x for x in (seconds[0], exposed[0])]
                + [f"{alone / seconds[0]:.1%}", 1e3 * exposed[1], f"{alone / seconds[1]:.1%}"]
            )
    now, then = ["step, ms", "exposed, ms", "efficiency"], ["exposed by bucket, ms", "efficiency then"]
    return Table(["", "GPUs", "MB sent", *now, *then], rows)
