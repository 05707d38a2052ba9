"""What README.md and docs/ name is there: links, configs, tools and their options, targets of make."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")
LINK = re.compile(r"\]\((?!https?://|#|mailto:)([^)#\s]+)")
CONFIG = re.compile(r"(?<![\w/])configs/[\w/.-]+\.yaml\b")
SCRIPT = re.compile(r"(?<![\w/])(?:tools|kd_core|kd_det|kd_cls|benchmarks|tests|docs)/[\w/]+\.py\b")
FOLDER = re.compile(r"`((?:kd_core|kd_det|kd_cls|configs|tools|benchmarks|tests)/(?:\w+/)*)`")
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
    assert len(set(CONFIG.findall(README))) >= 2 and len(set(SCRIPT.findall(README))) >= 6
    assert LINK.search(README) and MAKE.search(README)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 110


def test_every_page_is_linked_from_the_readme_or_from_a_page_that_is():
    def links(page: Path) -> set[Path]:
        return {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}

    linked = links(PAGES[0])
    linked |= {link for page in linked & set(PAGES) for link in links(page)}
    assert [page.name for page in PAGES[1:] if page not in linked] == []


def test_the_first_code_of_the_readme_runs():
    code = README.split("\n\n    ", 1)[1].split("\n\n", 1)[0]
    assert code.startswith("from kd_core import ")
    names = {
        "cross_entropy": torch.nn.functional.cross_entropy,
        "student_logits": torch.randn(4, 10, requires_grad=True),
        "teacher_logits": torch.randn(4, 10),
        "target": torch.arange(4),
    }
    exec(code.replace("\n    ", "\n"), names)
    assert set(names["terms"]) == {"tckd", "nckd"}
    names["total"].backward()
    assert names["student_logits"].grad.abs().sum() > 0


def test_targets_of_make_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{target}:" in makefile for target in MAKE.findall(README))


def commands(tool: str) -> str:
    """Every command of a tool on any page, without comments: in an indented line, or between backticks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [line.split(" # ")[0] for line in text.splitlines() if re.match(rf" +(python )?{tool} ", line)]
        found += [span for span in re.findall(r"`([^`\n]+)`", text) if span.startswith(f"{tool} ")]
    return "\n".join(found)


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_a_tool_answers_help_with_an_example_and_has_the_options_that_pages_give_it(tool: str, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [tool, "--help"])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    text = capsys.readouterr().out
    assert not ended.value.code and text.startswith(f"usage: {tool}") and f"tools/{tool}" in text
    assert [option for option in re.findall(r"--[a-z][\w-]*", commands(f"tools/{tool}")) if option not in text] == []


def test_every_tool_runs_as_the_command_that_pages_show():
    assert [path.name for path in (ROOT / "tools").glob("*.py") if not path.stat().st_mode & 0o100] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_folders_of_code_that_are_named_exist(page: Path):
    named = FOLDER.findall(page.read_text(encoding="utf-8"))
    assert [name for name in named if not (ROOT / name).is_dir()] == []


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_keys_in_pages_exist(page: Path):
    from kd_cls.config import get_cfg
    from kd_det.config import all_keys, kd_defaults

    later = {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE"}  # detectron2's main branch has it
    keys = {*all_keys(kd_defaults()), *all_keys(get_cfg()), *later}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:KD|SOLVER|MODEL|DATASETS|INPUT)(?:\.[A-Z][A-Z0-9_]+)+\b", text))
    assert named <= keys
