"""What each package needs, and what it must not need."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.import_graph import circles, import_graph

ROOT = Path(__file__).resolve().parent.parent
BELOW = {"kd_core": set(), "kd_det": {"kd_core"}, "kd_cls": {"kd_core"}, "tools": {"kd_core", "kd_det", "kd_cls"}}


def run(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process, in which `absent` makes packages look as if they were not installed."""
    absent = "import sys\ndef absent(*names):\n    for name in names: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", absent + code], capture_output=True, text=True, cwd=ROOT
    )


def test_kd_core_needs_torch_and_fvcore_only():
    code = """
absent("detectron2", "timm", "torchvision", "sklearn", "skimage", "matplotlib", "jinja2", "pycocotools", "cv2")
import pkgutil, importlib, kd_core
for module in pkgutil.walk_packages(kd_core.__path__, "kd_core."):
    importlib.import_module(module.name)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_kd_cls_never_imports_detectron2():
    code = """
absent("detectron2")
import pkgutil, importlib, kd_cls
for module in pkgutil.walk_packages(kd_cls.__path__, "kd_cls."):
    importlib.import_module(module.name)
assert not any(name.startswith("kd_det") for name in sys.modules)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_kd_det_says_how_to_install_detectron2_where_it_is_missing():
    done = run('absent("detectron2")\nimport kd_det')
    assert done.returncode != 0
    assert "kd_det needs detectron2: run `python tools/install_detectron2.py`" in done.stderr.splitlines()[-1]


def test_setup_py_imports_no_torch():
    done = run('absent("torch")\nsys.argv = ["setup.py", "--name"]\nexec(open("setup.py").read())')
    assert done.stdout.strip().splitlines()[-1] == "decoupled-kd", done.stderr


@pytest.mark.parametrize("extra", ["det", "cls", "dev"])
def test_no_extra_names_detectron2_which_no_index_has_under_that_name(extra):
    from importlib.metadata import requires

    assert any(f'extra == "{extra}"' in line for line in requires("decoupled-kd"))
    assert not any(line.startswith("detectron2") for line in requires("decoupled-kd"))


def test_no_module_imports_itself_by_way_of_others():
    found = circles(import_graph(ROOT, ["kd_core", "kd_det", "kd_cls"]))
    assert found == [], "\n".join(" ↔ ".join(circle) for circle in found)


@pytest.mark.parametrize("package", BELOW)
def test_a_package_imports_only_those_below_it(package):
    graph = import_graph(ROOT, list(BELOW))
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in sorted(others)
        if module.split(".")[0] == package and other.split(".")[0] not in BELOW[package] | {package}
    ]
    assert upward == []


SOURCES = {
    "p/__init__.py": "from .a import f\n",
    "p/a.py": "from p.sub import c\ndef f():\n    import p.late\n",
    "p/late.py": "from . import a\n",
    "p/sub/__init__.py": "from .c import d\n",
    "p/sub/c.py": "import os\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import late\nd = 1\n",
}


@pytest.mark.parametrize(
    ("line", "circle"),
    [
        ("", []),
        ("from .. import a", ["p.a", "p.sub", "p.sub.c"]),
        ("try:\n    from p.late import g\nexcept ImportError:\n    pass", ["p.a", "p.late", "p.sub", "p.sub.c"]),
        ("import p", ["p", "p.a", "p.sub", "p.sub.c"]),
    ],
    ids=["none", "relative", "within try", "the package itself"],
)
def test_circles_are_found(tmp_path, line, circle):
    for name, source in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source + (line if name == "p/sub/c.py" else ""))
    assert circles(import_graph(tmp_path, ["p"])) == ([circle] if circle else [])


# what is imported → the distribution that brings it, where their names differ
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "PyYAML", "sklearn": "scikit-learn", "skimage": "scikit-image"}
# imported where it is installed only; detectron2 has an installer of its own
OPTIONAL = {"wandb", "faster_coco_eval", "onnxruntime", "detectron2"}


def imported(package: str) -> set[str]:
    """The top-level names that a package's modules import."""
    names: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize(("package", "extra"), [("kd_core", None), ("kd_det", "DET"), ("kd_cls", "CLS")])
def test_what_a_package_imports_stands_in_setup_py(package, extra):
    required: dict[str, object] = {}
    exec((ROOT / "setup.py").read_text().split("setup(")[0], required)
    own = {re.split("[><=]", name)[0] for name in required.get(extra, [])}
    installed = {"torch", "fvcore", "numpy", "PyYAML", "tqdm"} | own
    if package == "kd_core":  # imported where a report is drawn and where weights are looked for: losses need none
        report = {re.split("[><=]", name)[0] for name in required["REPORT"]}
        installed |= report & imported("kd_core/utils/report") | {"huggingface_hub"}
    others = imported(package) - set(sys.stdlib_module_names) - OPTIONAL - {"kd_core", package}
    assert {DISTRIBUTIONS.get(name, name) for name in others} <= installed
