"""What README.md and docs/ name is there: links, configs, tools and their options, targets of make."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
CONFIG = re.compile(r"(?<![\w/])configs/[\w/.-]+\.yaml\b")
SCRIPT = re.compile(r"(?<![\w/])(?:tools|kd_cls|benchmarks)/\w+\.py\b")
MAKE = re.compile(r"^ +make ([\w-]+)", re.MULTILINE)


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page: Path):
    broken = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_configs_and_scripts_that_are_named_exist(page: Path):
    text = page.read_text(encoding="utf-8")
    assert [name for name in {*CONFIG.findall(text), *SCRIPT.findall(text)} if not (ROOT / name).is_file()] == []


def test_the_readme_names_configs_scripts_and_targets_at_all():
    assert len(set(CONFIG.findall(README))) >= 4 and len(set(SCRIPT.findall(README))) >= 6
    assert LINK.search(README) and MAKE.search(README)


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in MAKE.findall(README))


def commands(tool: str) -> str:
    """The README's commands of a tool, without their comments."""
    return "\n".join(line.split(" # ")[0] for line in README.splitlines() if line.startswith(f"    {tool} "))


@pytest.mark.parametrize("tool", sorted({name for name in SCRIPT.findall(README) if name.startswith("tools/")}))
def test_options_that_the_readme_gives_a_tool_are_ones_it_has(tool: str):
    source = (ROOT / tool).read_text(encoding="utf-8")
    if "argument_parser(__doc__)" in source:  # detectron2's options, and ours beside them
        from kd_det.engine.launch import argument_parser

        source = argument_parser("").format_help()
    assert [option for option in re.findall(r"--[a-z][\w-]*", commands(tool)) if option not in source] == []


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_answers_help_with_what_it_does_and_an_example(tool: str, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    text = capsys.readouterr().out
    assert not ended.value.code and text.startswith(f"usage: {tool}") and f"tools/{tool}" in text


def test_keys_in_commands_exist():
    from kd_det.config import all_keys, kd_defaults

    keys = set(all_keys(kd_defaults()))
    named = set(re.findall(r"\b(?:KD|SOLVER|MODEL|DATASETS|INPUT)(?:\.[A-Z][A-Z0-9_]+)+\b", README))
    assert len(named) >= 4 and named <= keys
