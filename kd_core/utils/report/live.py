"""report.html of a training that is running, and the line of its log that says where it stands."""

import logging
from collections.abc import Callable
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
    try:
        run = read(folder)
        teacher = teacher_folder(run)
        teachers = [read(teacher)] if teacher and (teacher / "config.yaml").is_file() else []
        runs = assign_roles([*teachers, run])
        page = make_page(runs, folder.name)
        page.write(folder / FILE, RELOAD_SECONDS if running else 0)
        return page
    except ImportError as error:
        logger.warning("%s is not written: %s (pip install matplotlib jinja2, or REPORT.ENABLED False)", FILE, error)
    except Exception:  # a page is not worth a training
        logger.exception("%s could not be written; the training continues", FILE)
    return None


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
