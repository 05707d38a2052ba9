"""Curves of a report: one small chart for each scalar, one line for each method, a band over its seeds."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

from kd_core.utils.report.page import Figure
from kd_core.utils.report.runs import Run

# Okabe and Ito's colours, which colour-blind readers tell apart; the line's dashes say the same once more.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":")
POINTS = 400  # of a line: more than the pixels of its chart
# matplotlib writes colours into the SVG; this one is replaced by that of the reader's light or dark scheme.
INK = "#010203"
SCHEMES = "<style>svg{color:#1c2126}@media(prefers-color-scheme:dark){svg{color:#dfe3e7}}</style>"
MAP_CLASSES = 200  # confusions are drawn for up to this many classes
LEGEND = {"loc": "outside upper left", "ncols": 2, "frameon": False}  # above the axes: it hides nothing
SIZE = 4.6, 3.1  # inches: at 11 points the text is read on a telephone


def charts(groups: dict[str, list[Run]], keys: Sequence[str]) -> list[Figure]:
    """A chart for each of `keys` that any method has at two iterations or more."""

    def length(key: str) -> int:
        return max((len(mean_over_runs(runs, key)[0]) for runs in groups.values()), default=0)

    return [chart(groups, key, key) for key in keys if length(key) > 1]


def chart(groups: dict[str, list[Run]], key: str, label: str) -> Figure:
    """`key` over the iterations: a line for each method; over several runs their mean, with a band of ± std."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(STYLE):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.add_subplot()
        lowest, highest, drawn = math.inf, 0.0, 0
        for index, (title, runs) in enumerate(groups.items()):
            x, y, width = mean_over_runs(runs, key)
            if not len(x):
                continue
            drawn += 1
            style = line_style(index)
            axes.plot(x, y, marker="o" if len(x) < 12 else None, markersize=4, linewidth=1.7, label=title, **style)
            if width is not None:
                axes.fill_between(x, y - width, y + width, color=style["color"], alpha=0.22, linewidth=0)
            good = y[np.isfinite(y)]
            lowest, highest = min([lowest, *good]), max([highest, *good])
        if lowest > 0 and highest > 100 * lowest:
            axes.set_yscale("log")
        axes.set_xlim(left=0)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.25)
        if drawn > 1:
            canvas.legend(**LEGEND)
        return Figure(label, svg(canvas), SVG, f"{label} over the iterations")


def line_style(index: int) -> dict[str, str]:
    """Colour and dashes of the method at a place: no two of the first 24 share both."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[(index + index // 6) % len(DASHES)]}


def reliability(curves: dict[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Accuracy over confidence, a line for each method; a calibrated one lies on the diagonal."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(STYLE):
        canvas = Canvas(figsize=SIZE, layout="constrained")
        axes = canvas.add_subplot()
        axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, alpha=0.5)
        for index, (title, (confidence, accuracy)) in enumerate(curves.items()):
            axes.plot(confidence, accuracy, marker="o", markersize=4, label=title, **line_style(index))
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        canvas.legend(**LEGEND)
        return Figure("Calibration", svg(canvas), SVG, "accuracy over confidence")


def confusion_map(counts: np.ndarray, title: str) -> Figure:
    """The map of confusions as a picture of a page."""
    alt = f"{title}: share of a class's images by predicted class"
    return Figure(title, svg(draw_confusions(counts)), SVG, alt)


def draw_confusions(counts: np.ndarray) -> "Canvas":
    """Rows: the class; columns: what is predicted; the lighter, the more often. Square, (C, C) counts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    with rc_context(STYLE):
        canvas = Canvas(figsize=(SIZE[0], SIZE[0]), layout="constrained")
        axes = canvas.add_subplot()
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        drawn = axes.imshow(shares, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xlabel="predicted class", ylabel="class")
        canvas.colorbar(drawn, ax=axes, shrink=0.8)
        return canvas


def mean_over_runs(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Iterations that all runs which have `key` share, the mean there, and its std where there are several runs."""
    lines = [dict(zip(*run.series(key), strict=True)) for run in runs]
    lines = [line for line in lines if line]
    if not lines:
        return np.empty(0), np.empty(0), None
    shared = sorted(set(lines[0]).intersection(*lines[1:]))
    shared = shared[:: max(1, -(-len(shared) // POINTS))]
    values = np.array([[line[x] for x in shared] for line in lines], dtype=float)
    width = values.std(axis=0, ddof=1) if len(lines) > 1 else None
    return np.array(shared), values.mean(axis=0), width


SVG = "image/svg+xml"
STYLE = {
    "font.size": 11,
    "svg.fonttype": "none",  # text as text: smaller, and in the reader's own font
    "svg.hashsalt": "report",  # the same file from the same run
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def svg(canvas: "Canvas") -> bytes:
    """A matplotlib figure as an SVG without background, in the ink of the reader's colour scheme."""
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().replace(INK, "currentColor")
    head, tag, rest = text.partition("<defs>")
    return (head + SCHEMES + tag + rest).encode()
