"""Run tests on a checkout of detectron2's sources, in place of the one that is installed.

    python tests/helpers/upstream.py DIR [pytest's arguments]

DIR is a clone of github.com/facebookresearch/detectron2, compiled or not. It stays as it is: what it lacks (a stand-in
for `_C` where nothing was compiled, the model zoo's configs, which its setup.py links) is in a temporary folder of
links.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ["tests/kd_det", "tests/tools", "tests/upstream"]


def overlay(checkout: Path, folder: Path) -> Path:
    """A folder to put on PYTHONPATH: the package `detectron2` of a checkout, complete.

    Raises:
        SystemExit: there is no such package.
    """
    source, package = checkout / "detectron2", folder / "detectron2"
    if not (source / "__init__.py").is_file():
        sys.exit(f"DETECTRON2={checkout}: there is no detectron2/__init__.py; give a clone of detectron2's repository")
    link_all(source, package, leave_out=["model_zoo", "_C.py"])  # the latter is no compiled code
    link_all(source / "model_zoo", package / "model_zoo", leave_out=["configs"])
    (package / "model_zoo" / "configs").symlink_to((checkout / "configs").resolve())
    if not any(path.suffix in (".so", ".pyd") for path in source.glob("_C.*")):
        (package / "_C.py").write_text(stand_in_for_compiled_code(), encoding="utf-8")
    return folder


def stand_in_for_compiled_code() -> str:
    """The module `_C` that tools/install_detectron2.py gives a Python-only detectron2."""
    spec = importlib.util.spec_from_file_location("install_detectron2", ROOT / "tools" / "install_detectron2.py")
    installer = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(installer)
    return installer.C_MODULE


def link_all(source: Path, target: Path, leave_out: list[str]) -> None:
    """A folder with a link to everything in `source` but what is left out."""
    target.mkdir()
    for path in source.iterdir():
        if path.name not in (*leave_out, "__pycache__"):
            (target / path.name).symlink_to(path.resolve())


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit("usage: make test-upstream DETECTRON2=DIR, a clone of github.com/facebookresearch/detectron2")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "path").mkdir()
        paths = [overlay(Path(sys.argv[1]), folder / "path"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        variables = {
            "KD_UPSTREAM": str(Path(sys.argv[1]).resolve()),  # tests/upstream reads its projects
            "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
            "PYTHONPYCACHEPREFIX": str(folder / "cache"),  # no __pycache__ in the checkout
        }
        command = [sys.executable, "-m", "pytest", *(sys.argv[2:] or TESTS)]
        return subprocess.run(command, cwd=ROOT, env=os.environ | variables).returncode


if __name__ == "__main__":
    sys.exit(main())
