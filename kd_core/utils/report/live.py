"""report.html that a training or a distillation writes, and the line of the log that says where a training stands."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kd_core.utils.report.page import Page
from kd_core.utils.report.runs import Run, assign_roles, read_lines, teacher_folder

logger = logging.getLogger(__name__)
FILE = "report.html"
RELOAD_SECONDS = 60


def write_live_report(
    output_dir: str | Path, read: Callable[[Path], Run], make_page: Callable[..., Page], running: bool
) -> Page | None:
    """Write `output_dir`/report.html, with the teacher beside the run where its folder is here; returns the page.

    Whatever goes wrong is logged and does not end the training.

    Args:
        read: reads a run of the package that trains.
        make_page: (runs, title) → the page.
        running: the browser then reloads the page every minute.
    """
    folder = Path(output_dir).resolve()
    if not (folder / "config.yaml").is_file():  # a trainer built in Python, without the command that writes it
        return None
    page = None
    with logged_errors():
        run = read(folder)
        teacher = teacher_folder(run)
        teachers = [read(teacher)] if teacher and (teacher / "config.yaml").is_file() else []
        runs = assign_roles([*teachers, run])
        page = make_page(runs, folder.name)
        page.write(folder / FILE, RELOAD_SECONDS if running else 0)
    return page


def write_distillation_report(
    output: Path, names: Iterable[str], read: Callable[[Path], Run], make_page: Callable[..., Page]
) -> bool:
    """Write `output`/report.html about the runs in its folders `names`; returns whether it is there.

    Whatever goes wrong is logged. For `read` and `make_page` see `write_live_report`.
    """
    with logged_errors():
        runs = assign_roles([read(output / name) for name in names if (output / name / "config.yaml").is_file()])
        make_page(runs, output.resolve().name).write(output / FILE)
        return True
    return False


@contextmanager
def logged_errors() -> Iterator[None]:
    """Log what goes wrong with a page, which is not worth a training."""
    try:
        yield
    except ImportError as error:
        logger.warning("%s is not written: %s (pip install matplotlib jinja2, or REPORT.ENABLED False)", FILE, error)
    except Exception:
        logger.exception("%s could not be written; everything else continues", FILE)


def logged(output_dir: str | Path) -> Run:
    """What metrics.json has so far."""
    return Run(Path(output_dir), {}, read_lines(Path(output_dir, "metrics.json")))


def status_line(iteration: int, max_iter: int, label: str, values: list[tuple[int, Any]]) -> str:
    """ "Status: iteration 400 of 700 (57 %), AP 30.12, best 31.00 at 300".

    Args:
        values: (iteration, value) of every evaluation.
    """
    # A finished run that is resumed is evaluated once more, one iteration later.
    iteration = min(iteration, max_iter)
    values = [(min(found, max_iter), value) for found, value in values]
    share = f"iteration {iteration} of {max_iter} ({100 * iteration / max(max_iter, 1):.0f} %)"
    start = "finished" if iteration >= max_iter else "at"
    words = [f"Status: {start} {share}" if start == "at" else f"Status: finished, {share}"]
    if values:
        best = max(values, key=lambda pair: pair[1] if pair[1] == pair[1] else float("-inf"))
        words += [f"{label} {values[-1][1]:.2f}", f"best {best[1]:.2f} at {best[0]}"]
    else:
        words.append("not evaluated yet")
    return ", ".join(words)
