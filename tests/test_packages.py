"""What each package needs, and what it must not need."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(code: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh process, in which `absent` makes packages look as if they were not installed."""
    absent = "import sys\ndef absent(*names):\n    for name in names: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", absent + code], capture_output=True, text=True, cwd=ROOT
    )


def test_kd_core_needs_torch_and_fvcore_only():
    code = """
absent("detectron2", "timm", "torchvision", "sklearn", "skimage", "matplotlib", "pycocotools", "cv2")
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
