"""Tables and figures of a Markdown page, drawn from JSON files that are committed beside it.

A block of the page names what is drawn, and is replaced by it:

    <!-- drawn: {what: seeds, from: results/digits.json, of: bbox/AP, baseline: plain} -->
    …
    <!-- end -->

`what`: "seeds", a value for each seed, mean ± std and paired differences to `baseline`; "curves", a figure of `of` over
the iterations; "search", the table of a tools/search.py (its results.json); "tries", the values of its search by one
key, `by`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text, write_whole
from kd_core.utils.report.curves import chart
from kd_core.utils.report.runs import EVALUATED, Run, by_title, complete_groups
from kd_core.utils.report.tables import Metric, markdown, seeds_table

OPENING = "<!-- drawn: "
BLOCK = re.compile(rf"({OPENING}(\{{.*?\}}) -->\n).*?(<!-- end -->)", re.DOTALL)
KEPT = re.compile(rf"iteration|(.+/)?({'|'.join(EVALUATED)})/.+|val/.+|time")  # of metrics.json in a committed file


def kept(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if KEPT.fullmatch(key)}


def write_runs(path: Path, runs: list[Run]) -> None:
    """Write the results, curves and origin of `runs`, whose roles are assigned."""
    content = [
        {
            **{name: getattr(run, name) for name in ("name", "title", "role", "seed", "max_iter", "info")},
            "lines": [line for line in map(kept, run.lines) if len(line) > 1],
        }
        for run in runs
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"runs": content}, indent=1) + "\n")


def read_runs(path: Path) -> list[Run]:
    """The runs that `write_runs` has written."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} holds no runs: write it by tools/report.py OUTPUT … --json FILE") from error
    return [Run(Path(one.pop("name")), {"SEED": one.pop("seed")}, **one) for one in content]


def redraw(page: Path, runs_of: Callable[[Path], list[Run]], search_table: Callable[[Path, str], str]) -> list[Path]:
    """Draw every block of `page` anew; returns the files that were written.

    Args:
        runs_of: reads the runs in a JSON file.
        search_table: draws the table of a search's results.json, or the tries by a key.

    Raises:
        UserError: a block that does not say what to draw from what.
    """
    written, old = [page], page.read_text(encoding="utf-8")
    blocks = [block[0] for block in BLOCK.finditer(old)]
    if not blocks and OPENING not in old:
        raise UserError(f"{page} has no line {OPENING}{{…}} -->: nothing to draw")
    if len(blocks) != old.count(OPENING) or any(block.count(OPENING) > 1 for block in blocks):
        raise UserError(f"{page}: a line {OPENING}{{…}} --> has no <!-- end --> after it")

    def draw(block: re.Match) -> str:
        asked = yaml.safe_load(block[2])
        source, what = page.parent / asked.get("from", ""), asked.get("what")
        if not source.is_file():
            raise UserError(f"{page}: {block[2]}: there is no file {source}")
        if what == "search":
            text = search_table(source, "")
        elif what == "tries":
            if "by" not in asked:
                raise UserError(f"{page}: {block[2]}: tries needs by, a key of the grids")
            text = search_table(source, asked["by"])
        elif what in ("seeds", "curves") and "of" not in asked:
            raise UserError(f"{page}: {block[2]}: {what} needs of, a key of metrics.json")
        elif what == "seeds":
            metric = Metric(asked.get("label", asked["of"]), asked["of"])
            runs = having(asked, runs_of(source))
            text = markdown(seeds_table(complete_groups(runs, metric.key), metric, asked.get("baseline")))
        elif what == "curves":
            text = figure(asked, having(asked, runs_of(source)))
        else:
            raise UserError(f"{page}: {block[2]}: what is {what!r}, expected seeds, curves, search or tries")
        return f"{block[1]}{text}\n{block[3]}"

    def having(asked: dict[str, Any], runs: list[Run]) -> list[Run]:
        if not any(run.series(asked["of"])[0] for run in runs):
            raise UserError(f"{page}: {asked['from']} has no {asked['of']}: results of evaluations are kept, no losses")
        return runs

    def figure(asked: dict[str, Any], runs: list[Run]) -> str:
        label = asked.get("label", asked["of"])
        drawn = chart(by_title(runs), asked["of"], label)
        stem = "_".join(Path(asked["from"]).with_suffix("").parts).removeprefix("results_")
        name = f"{stem}_{asked['of'].replace('/', '_')}.svg"
        path = page.parent / "figures" / name
        path.parent.mkdir(exist_ok=True)
        write_whole(path, lambda file: file.write(drawn.content))
        written.append(path)
        return f"![{drawn.alt}](figures/{name})"

    def named(block: re.Match) -> str:
        try:
            return draw(block)
        except UserError as error:
            raise error if str(page) in str(error) else UserError(f"{page}: {block[2]}: {error}") from error

    write_text(page, BLOCK.sub(named, old))
    return written
