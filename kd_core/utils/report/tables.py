"""Tables of a report: numbers that keep their full value, mean ± std over seeds, paired differences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from kd_core.utils.errors import UserError
from kd_core.utils.report.runs import Run, finite


@dataclass(frozen=True)
class Number:
    """A number in a page: `text` is shown, `value` is the full value in its tooltip.

    Attributes:
        key, run: the key of metrics.json and the OUTPUT_DIR that it comes from, where it comes from one.
    """

    value: float
    text: str
    key: str = ""
    run: str = ""


Cell = list[str | Number]


@dataclass
class Table:
    """Rows of cells under a header; the first cell of a row is its header.

    Attributes:
        paged: number of rows that stand open; further ones are folded away. 0: all.
    """

    header: list[str]
    rows: list[tuple[str, list[Cell]]]
    caption: str = ""
    paged: int = 0


@dataclass(frozen=True)
class Metric:
    """A row of the table of results.

    Attributes:
        key: in metrics.json.
        label: of the row.
        digits: after the point.
        value: computes it from a run; default: the last value of `key`.
        show: the text of a value; default: with `digits`.
    """

    label: str
    key: str = ""
    digits: int = 2
    value: Callable[[Run], float | None] | None = None
    show: Callable[[float], str] | None = field(default=None)

    def of(self, run: Run) -> float | None:
        return self.value(run) if self.value else run.last(self.key)

    def text(self, value: float) -> str:
        if math.isnan(value):
            return "NaN"
        return self.show(value) if self.show else f"{value:.{self.digits}f}"


def group_cell(metric: Metric, runs: Sequence[Run]) -> Cell:
    """One run's value, or mean ± sample standard deviation over the runs that have one."""
    values = [(run, value) for run in runs if (value := metric.of(run)) is not None]
    if not values:
        return ["–"]
    if len(values) == 1:
        run, value = values[0]
        source = (metric.key, str(run.folder)) if metric.key else ()
        return [Number(value, metric.text(value), *source)]
    numbers = finite(value for _, value in values)
    if len(numbers) < len(values):
        return [f"NaN in {len(values) - len(numbers)} of {len(values)} runs" if numbers else "NaN"]
    if len(set(numbers)) == 1:
        return [Number(numbers[0], metric.text(numbers[0]), metric.key)]
    return spread_cell(numbers, metric.text)


def mean_std(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation; of one value, only the value."""
    if len(values) < 2:
        return "".join(f"{value:.{digits}f}" for value in values)
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def spread_cell(numbers: Sequence[float], text: Callable[[float], str]) -> Cell:
    """mean ± std."""
    centre, width = mean(numbers), stdev(numbers)
    return [Number(centre, text(centre)), " ± ", Number(width, text(width))]


def results_table(groups: dict[str, list[Run]], metrics: Sequence[Metric], caption: str = "") -> Table:
    """A column for each method and a row for each metric that any of them has."""
    rows = [(metric.label, [group_cell(metric, runs) for runs in groups.values()]) for metric in metrics]
    header = ["", *(f"{title} ({len(runs)} runs)" if len(runs) > 1 else title for title, runs in groups.items())]
    return Table(header, [row for row in rows if any(cell != ["–"] for cell in row[1])], caption)


def seeds_table(groups: dict[str, list[Run]], metric: Metric, baseline: str | None = None) -> Table:
    """A row for each method: its mean ± std, a value for each seed, and the paired difference to `baseline`."""
    seeds = sorted({seed for runs in groups.values() for seed in by_seed(runs)})
    differences = dict(paired_table(groups, baseline, [metric]).rows) if baseline else {}
    rows = []
    for title, runs in groups.items():
        known = by_seed(runs)
        each = [group_cell(metric, [known[seed]]) if seed in known else ["–"] for seed in seeds]
        paired = [differences.get(title, [["–"]])[-1]] if baseline else []
        rows.append((title, [group_cell(metric, runs), *each, *paired]))
    header = ["", metric.label, *(f"seed {seed}" for seed in seeds)]
    return Table([*header, *([f"difference to {baseline}"] if baseline else [])], rows)


def markdown(table: Table) -> str:
    """The table, as the pages of docs have it."""

    def text(cell: Cell) -> str:
        return "".join(piece.text if isinstance(piece, Number) else piece for piece in cell)

    rows = [table.header, *([name, *map(text, cells)] for name, cells in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows]
    return "\n".join([lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]])


def runs_table(runs: Sequence[Run], metrics: Sequence[Metric], status: Callable[[Run], str]) -> Table:
    """A row for each run."""
    shown = [metric for metric in metrics if any(metric.of(run) is not None for run in runs)]
    rows = []
    for run in runs:
        cells: list[Cell] = [[run.title], [str(run.seed)], [status(run).split(" ", 1)[1]]]
        rows.append((run.name, [*cells, *(group_cell(metric, [run]) for metric in shown)]))
    return Table(["run", "method", "seed", "state", *(metric.label for metric in shown)], rows)


def by_seed(runs: Sequence[Run]) -> dict[int, Run]:
    """The runs whose seed tells them apart: one that was drawn (−1, or none) or that several have does not."""
    seeds = [run.seed for run in runs]
    return {run.seed: run for run in runs if run.seed is not None and run.seed >= 0 and seeds.count(run.seed) == 1}


def paired_table(groups: dict[str, list[Run]], baseline: str, metrics: Sequence[Metric]) -> Table:
    """Differences to the method `baseline` over the seeds that both have: mean ± std, and how many are above it.

    Raises:
        UserError: there is no method of that name.
    """
    if baseline not in groups:
        raise UserError(f"--baseline {baseline}: the runs' methods are {', '.join(groups)}")
    base = by_seed(groups[baseline])
    rows = []
    for title, runs in groups.items():
        pairs = [(run, base[seed]) for seed, run in by_seed(runs).items() if seed in base]
        if title == baseline or not pairs or runs[0].role == "teacher":
            continue
        cells = [[f"{len(pairs)} ({', '.join(str(run.seed) for run, _ in pairs)})"]]
        cells += [difference_cell(metric, pairs) for metric in metrics]
        rows.append((title, cells))
    header = ["", "seeds in common", *(metric.label for metric in metrics)]
    return Table(header, rows, f"Difference to {baseline} with the same seed: mean ± std, and on how many seeds above.")


def difference_cell(metric: Metric, pairs: Sequence[tuple[Run, Run]]) -> Cell:
    values = [(metric.of(run), metric.of(other)) for run, other in pairs]
    differences = [a - b for a, b in values if len(finite([a, b])) == 2]
    if not differences:
        return ["–"]

    def signed(value: float) -> str:
        return f"{value:+.{metric.digits}f}"

    if len(differences) == 1:
        return [Number(differences[0], signed(differences[0]))]
    wins = sum(difference > 0 for difference in differences)
    centre, width = mean(differences), stdev(differences)
    spread = Number(width, f"{width:.{metric.digits}f}")
    return [Number(centre, signed(centre)), " ± ", spread, f" · {wins} of {len(differences)}"]
