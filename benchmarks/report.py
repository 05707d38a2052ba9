"""Fill docs/performance.md with what was measured:  python benchmarks/report.py [--page FILE] [--figures DIR]

Writes the table TABLE of NAME.json between the lines `<!-- bench: NAME.TABLE -->` and `<!-- /bench -->` of the page,
and the picture for `growth.plot`. Below the first block of each benchmark stand its command, commit and machine. A
benchmark that was not run keeps its blocks; an empty block says how to fill it.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import growth
from figures import OUTPUT, ROOT, Table

from kd_core.utils.files import write_text

PAGE = ROOT / "docs" / "performance.md"
BLOCK = re.compile(r"(<!-- bench: (?P<name>\w+)\.(?P<table>\w+) -->\n)(?P<old>.*?)(<!-- /bench -->)", re.DOTALL)
MISSING = "*Not measured yet: run `make bench`, then `python benchmarks/report.py`.*"


def fill(text: str, figures: Path, pictures: Path) -> str:
    """The page with the content of every block replaced.

    Args:
        text: the page.
        figures: the folder of the JSON files.
        pictures: the folder of the plot, next to the page.
    Raises:
        ValueError: a block names a table that its file does not have, or has no closing line.
    """
    blocks = list(BLOCK.finditer(text))
    if len(blocks) != text.count("<!-- bench: ") or any(block[0].count("<!-- bench: ") > 1 for block in blocks):
        raise ValueError("a line <!-- bench: NAME.TABLE --> has no <!-- /bench --> after it")
    named: set[str] = set()  # benchmarks whose command and machine are already on the page

    def renewed(block: re.Match[str]) -> str:
        first = block["name"] not in named
        named.add(block["name"])
        return f"{block[1]}{content(block, figures, pictures, with_origin=first)}\n{block[5]}"

    return BLOCK.sub(renewed, text)


def content(block: re.Match[str], figures: Path, pictures: Path, with_origin: bool) -> str:
    """What stands between the lines of a block."""
    path = figures / f"{block['name']}.json"
    if not path.exists():
        return block["old"].strip() or MISSING
    measured = json.loads(path.read_text())
    if (block["name"], block["table"]) == ("growth", "plot"):
        growth.plot(measured["curves"], pictures / "growth.png")
        shown = f"![Time and memory over classes, rows and parameters]({pictures.name}/growth.png)"
    elif block["table"] in measured["tables"]:
        shown = str(Table(**measured["tables"][block["table"]]))
    else:
        raise ValueError(f"{path} has no table {block['table']!r}: it has {', '.join(measured['tables'])}")
    return f"{shown}\n\n{origin(measured)}" if with_origin else shown


def origin(measured: dict[str, Any]) -> str:
    """Command, commit, machine and versions."""
    machine = measured["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "torchvision", "timm", "detectron2"))
    where = f"{machine['device']}: {machine['processor']}" if machine["device"] == "CPU" else machine["device"]
    return (
        f"`{measured['command']}` · commit {measured['commit'] or 'unknown'} · {where}, {machine['cores']} cores, "
        f"{machine['threads']} threads · Python {machine['python']}, {versions}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--figures", type=Path, default=OUTPUT, help="the folder of the JSON files")
    args = parser.parse_args(arguments)
    filled = fill(args.page.read_text(encoding="utf-8"), args.figures, args.page.parent / "figures")
    write_text(args.page, filled)
    print(f"{args.page}: {filled.count(MISSING)} of {len(BLOCK.findall(filled))} blocks have no figures yet")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
