"""Every yaml snippet of the detector's pages is a config that builds its loss."""

import re

import pytest

from kd_det.config import build_box_loss, kd_defaults, merge_file
from kd_det.solver import check_solver

from .conftest import ROOT

PAGES = [ROOT / "docs" / "detection.md", ROOT / "docs" / "dense.md", *(ROOT / "docs" / "methods").glob("*.md")]
SNIPPETS = [
    (page.name, snippet) for page in PAGES for snippet in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
]


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SNIPPETS)])
def test_a_snippet_is_a_config_that_means_something(tmp_path, page, snippet):
    path = tmp_path / "snippet.yaml"
    path.write_text(snippet)
    cfg, defaults = kd_defaults(), kd_defaults()
    merge_file(cfg, str(path))
    assert cfg.dump() != defaults.dump()
    check_solver(cfg)
    loss = build_box_loss(cfg)
    if page not in ("detection.md", "dense.md"):  # a page of a method shows that method
        name = page.removesuffix(".md")
        composed = {"dot": ("kd", "dot_sgd"), "deepkd": ("dkd", "deepkd_sgd")}
        shown = cfg.KD.LOSS.NAME, cfg.SOLVER.OPTIMIZER
        assert shown == composed.get(name, (name, "sgd"))
        assert loss.temperature == 1.0


def test_every_method_has_one():
    shown = {page for page, _ in SNIPPETS}
    assert {f"{name}.md" for name in ("kd", "dkd", "gdkd", "aekt", "deepkd", "dot")} <= shown
