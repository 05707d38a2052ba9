#!/usr/bin/env python
"""One HTML page about trainings, finished or running: results, curves, pictures, and how they were made.

    tools/report.py output/digits/teacher output/digits/baseline output/digits/dkd --html report.html
    tools/report.py output/table/* --baseline KD --html table.html   # methods × seeds: mean ± std, paired differences
    tools/report.py output/digits/cls_dkd --html classifier.html     # a classifier's; with SEEDS all of its seeds
    tools/report.py output/table/* --json docs/results/table.json    # their results and curves, in a file to commit
    tools/report.py --page docs/results.md                           # draw the tables and figures of a page from such

Every OUTPUT is an OUTPUT_DIR of a training or of an evaluation (--eval-only), all of detectors or all of classifiers; a
student's teacher is added if its own OUTPUT_DIR is still beside its weights. The page needs no network: one file can be
sent to others.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from kd_core.utils.errors import UserError, exit_on_user_error
from kd_core.utils.report.results import read_runs, redraw, write_runs
from kd_core.utils.report.runs import Run, assign_roles, by_title, lookup, read_run, teacher_folder


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outputs", nargs="*", type=Path, metavar="OUTPUT", help="a training's OUTPUT_DIR")
    parser.add_argument("--html", type=Path, help="the report to write")
    parser.add_argument("--json", type=Path, help="the file of results to write")
    parser.add_argument("--page", type=Path, help="a Markdown page, whose marked blocks are drawn from such files")
    parser.add_argument("--title", help="default: the runs' names")
    parser.add_argument("--baseline", help="method that the others are compared with, as the page calls it: plain, DKD")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    exit_on_user_error("report", lambda: run(parse_arguments(arguments)))


def run(options: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    if not (options.page or (options.outputs and (options.html or options.json))):
        raise UserError("give OUTPUT … and --html or --json, or give --page")
    if options.html:
        runs = write_report(options.outputs, options.html, options.title, options.baseline)
        print(f"{len(runs)} runs: {options.html} ({options.html.stat().st_size / 1e6:.1f} MB)")
    if options.json:
        runs = assign_roles(map(read_whole, with_teachers(each_run(options.outputs))))
        write_runs(options.json, runs)
        print(f"{len(runs)} runs: {options.json}")
    if options.page:
        print("\n".join(map(str, redraw(options.page, runs_in, search_table))))


def runs_in(path: Path) -> list[Run]:
    """The runs of a file of results: of --json, or the tests of a tools/search.py."""
    return open_search(path).tested() if is_search(path) else read_runs(path)


def search_table(path: Path, by: str) -> str:
    """The table of a tools/search.py, or the tries of its search by one key."""
    if not is_search(path):
        raise UserError(f"{path} is no results.json of tools/search.py")
    search = open_search(path)
    return search.tries_by(by) if by else search.report()


def is_search(path: Path) -> bool:
    try:
        return "trainings" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no json that can be read: {error}") from error


def open_search(path: Path) -> Any:
    """`search.Search` of a results.json."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from search import of_results

    return of_results(path)


def write_report(outputs: list[Path], html: Path, title: str | None = None, baseline: str | None = None) -> list[Run]:
    """Write the page about the trainings in `outputs`; returns them."""
    folders = with_teachers(each_run(outputs))
    kinds = {kind_of(read_run(folder)) for folder in folders}
    if len(kinds) > 1:
        raise UserError("detectors and classifiers are among the runs: make a report of each")
    # detectron2 takes seconds to import, and a machine for classifiers may not have it
    if kinds == {"detector"}:
        from kd_det.analysis.flops import measure_cost
        from kd_det.evaluation.html_report import detector_page as make_page
        from kd_det.evaluation.html_report import read_detector_run as read
    else:
        from kd_cls.report import classifier_page as make_page
        from kd_cls.report import read_classifier_run as read
    runs = assign_roles(read(folder) for folder in folders)
    if kinds == {"detector"}:
        measure_cost(runs)
    make_page(runs, title or ", ".join(by_title(runs)), baseline).write(html)
    return runs


def each_run(outputs: list[Path]) -> list[Path]:
    """The folders, that of a training with SEEDS replaced by those of its seeds.

    Raises:
        UserError: there is no such folder, or no training in it.
    """
    folders = []
    for output in outputs:
        if output.is_file():  # of output/table/*, where tools/run_table.py writes its table too
            continue
        if not output.is_dir():
            raise UserError(f"there is no folder {output}")
        seeds = sorted(path.parent for path in output.glob("seed_*/config.yaml"))
        folders += seeds or [output]
    if not folders:
        raise UserError(f"there is no folder among {', '.join(map(str, outputs))}")
    return list(dict.fromkeys(folders))


def with_teachers(folders: list[Path]) -> list[Path]:
    """The folders, and before them those of the students' teachers that are trainings of ours."""
    found = list(folders)
    for folder in folders:
        teacher = teacher_folder(read_run(folder))
        is_ours = teacher and all((teacher / name).is_file() for name in ("config.yaml", "metrics.json"))
        if is_ours and teacher not in {each.resolve() for each in found}:
            found.insert(0, teacher)
    return found


def read_whole(folder: Path) -> Run:
    """A run with the length of its schedule, by which it is finished or not."""
    if kind_of(read_run(folder)) == "detector":
        from kd_det.evaluation.html_report import read_detector_run as read
    else:
        from kd_cls.report import read_classifier_run as read
    return read(folder)


def kind_of(run: Run) -> str:
    """Which package trained it: detectron2's configs have META_ARCHITECTURE, its LazyConfigs a dataloader."""
    detector = lookup(run.config, "MODEL", "META_ARCHITECTURE") or "dataloader" in run.config
    return "detector" if detector else "classifier"


if __name__ == "__main__":
    sys.exit(main())
