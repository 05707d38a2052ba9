#!/usr/bin/env python
"""Install detectron2 where none is importable.

A detectron2 that is already there is kept, whatever its version. Otherwise the official v0.5 Python sources are
fetched from the package index (where they stand as the sdist `detectron2-cdo`), checked against a known SHA-256,
repaired for current torch, numpy and Pillow, and installed with pip as the distribution `detectron2` 0.5+py: `pip
list` shows it, `pip uninstall detectron2` removes it. It holds no compiled code: boxes, ROIAlign and NMS come from
torchvision, so Faster, Mask, Keypoint and Cascade R-CNN train and evaluate; deformable convolutions and rotated boxes
need a compiled upstream build.

    python tools/install_detectron2.py

Upstream's project DeepLab is installed with it, as `detectron2.projects.deeplab`.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

SDIST = "detectron2-cdo==0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

PYPROJECT = """\
[build-system]
requires = ["setuptools>=68", "wheel"]
build-backend = "setuptools.build_meta"

[project]
name = "detectron2"
version = "0.5+py"
description = "detectron2 v0.5, Python sources only, repaired for current torch, numpy and Pillow"
license = {text = "Apache-2.0"}
dependencies = ["torch", "torchvision", "fvcore", "iopath", "pycocotools", "yacs", "omegaconf", "hydra-core", "Pillow",
    "matplotlib", "termcolor", "tabulate", "cloudpickle", "tqdm", "tensorboard", "pydot"]

[tool.setuptools.packages.find]
include = ["detectron2*"]

[tool.setuptools.package-data]
"detectron2.model_zoo" = ["configs/**/*"]
"""

# `from detectron2 import _C` stands at the top of modules that every detector imports, used or not; the versions go
# into the log.
C_MODULE = '''\
"""Stands in for detectron2's compiled operators, which a Python-only installation does not have."""


def get_compiler_version() -> str:
    return "none (Python only)"


def get_cuda_version() -> str:
    return "none (Python only)"


def has_cuda() -> bool:
    return False


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)
    raise AttributeError(
        f"detectron2._C.{name} is a compiled operator and this detectron2 (0.5+py) has none: "
        "install a compiled upstream build"
    )
'''


class InstallError(Exception):
    """One sentence for the user; printed without a traceback."""


@dataclass(frozen=True)
class Repair:
    """Every match of `pattern` in `file` becomes `replacement`; a repair that finds nothing to do is an error."""

    file: str
    pattern: str
    replacement: str
    why: str


NUMPY_ALIASES = "numpy 1.24 removed its aliases of Python's own types"
REPAIRS = [
    Repair("data/transforms/transform.py", r"Image\.LINEAR\b", "Image.BILINEAR", "Pillow 10 removed the alias LINEAR"),
    *(
        Repair(file, r"\bnp\.(int|float|str|bool|object)\b", r"\1", NUMPY_ALIASES)
        for file in (
            "data/build.py",
            "data/datasets/pascal_voc.py",
            "evaluation/pascal_voc_evaluation.py",
            "evaluation/sem_seg_evaluation.py",
            "structures/masks.py",
            "utils/video_visualizer.py",
            "utils/visualizer.py",
        )
    ),
    Repair("model_zoo/model_zoo.py", r"import pkg_resources\n", "", "setuptools 81 removed pkg_resources"),
    Repair(
        "model_zoo/model_zoo.py",
        r"pkg_resources\.resource_filename\(\s*\"detectron2\.model_zoo\", (os\.path\.join\([^)]*\))\s*\)",
        r"os.path.join(os.path.dirname(os.path.abspath(__file__)), \1)",
        "setuptools 81 removed pkg_resources",
    ),
    Repair(
        "evaluation/coco_evaluation.py",
        r"use_fast_impl=True",
        "use_fast_impl=False",
        "the fast COCO evaluation is compiled code; pycocotools gives the same figures",
    ),
    Repair(
        "export/__init__.py",
        r"from \.api import \*\n",
        "try:\n    from .api import *\nexcept ImportError:  # only Caffe2Tracer needs it\n    pass\n",
        "caffe2 left torch in 2.4",
    ),
]


def installed_version() -> str | None:
    """Version of the detectron2 that a fresh process can import; None where there is none.

    Raises:
        InstallError: one is installed but its import fails.
    """
    if importlib.util.find_spec("detectron2") is None:
        return None
    run = subprocess.run(
        [sys.executable, "-c", "import detectron2, detectron2.modeling; print(detectron2.__version__)"],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode:
        reason = run.stderr.strip().splitlines()[-1]
        raise InstallError(
            f"detectron2 is installed but cannot be imported ({reason}): repair it, or remove it with "
            "`pip uninstall detectron2` and run this again."
        )
    return run.stdout.strip()


def index_arguments() -> list[str]:
    """pip's own index, so that a mirror set for pip serves here too (unearth reads no pip configuration)."""
    url = os.environ.get("PIP_INDEX_URL")
    if not url:
        for scope in ("global", "install", "download"):
            got = subprocess.run(
                [sys.executable, "-m", "pip", "config", "get", f"{scope}.index-url"],
                capture_output=True,
                text=True,
                check=False,
            )
            url = url or got.stdout.strip()
    return ["--index-url", url] if url else []


def download(folder: Path) -> Path:
    """Fetch the sdist without installing it: pip itself refuses, since one of its extras declares a URL."""
    if importlib.util.find_spec("unearth") is None:
        raise InstallError("The downloader `unearth` is missing: run `pip install unearth` first.")
    command = [sys.executable, "-m", "unearth", "--no-binary", *index_arguments(), "--download", str(folder), SDIST]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return Path(json.loads(run.stdout)["local_path"])
    except (ValueError, KeyError, TypeError):
        reason = (run.stderr.strip().splitlines() or ["no answer"])[-1]
        raise InstallError(
            f"Could not fetch {SDIST}: no package index answered with it ({reason}); check the network and "
            "pip's index settings, or install a compiled upstream detectron2 (docs/tools.md)."
        ) from None


def verify(archive: Path, sha256: str = SHA256) -> None:
    """Refuse anything but the very file this script was tested with."""
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise InstallError(f"{archive.name} has SHA-256 {found}, expected {sha256}: refusing to install it.")


def repair(package: Path) -> None:
    """Apply every `Repair` to the unpacked `detectron2/` folder and add the stand-in for `_C`."""
    for fix in REPAIRS:
        path = package / fix.file
        text, count = re.subn(fix.pattern, fix.replacement, path.read_text(encoding="utf-8"))
        if not count:
            raise InstallError(
                f"{fix.file} holds nothing that matches {fix.pattern!r} ({fix.why}): unexpected sources."
            )
        path.write_text(text, encoding="utf-8")
    (package / "_C.py").write_text(C_MODULE, encoding="utf-8")


def repackage(archive: Path, project: Path) -> None:
    """Unpack the `detectron2/` folder of `archive` into `project`, repaired and with a `pyproject.toml` of its own."""
    unpacked = project / "sdist"
    with tarfile.open(archive) as tar:
        # Python has this filter from 3.11.4; its digest says that the archive is the expected one.
        tar.extractall(unpacked, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (root,) = unpacked.iterdir()
    shutil.move(root / "detectron2", project / "detectron2")
    # As upstream's setup.py installs it.
    shutil.move(root / "projects" / "DeepLab" / "deeplab", project / "detectron2" / "projects" / "deeplab")
    shutil.rmtree(unpacked)
    repair(project / "detectron2")
    (project / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")


def pip_install(project: Path) -> None:
    """Install with the setuptools at hand; nothing is downloaded where the dependencies are already there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", str(project)]
    if subprocess.run(command, check=False).returncode:
        raise InstallError("pip could not install the repackaged detectron2 (its message is above).")


def install() -> None:
    version = installed_version()
    if version is not None:
        print(f"detectron2 {version} is there already; kept as it is.")
        return
    if importlib.util.find_spec("pip") is None:
        raise InstallError(
            f"{sys.executable} has no pip, which installs detectron2: run `{sys.executable} -m ensurepip`; where that "
            "is missing too, install your system's python3-venv (Debian, Ubuntu) or python3-pip, and make the "
            "environment anew."
        )
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("torchvision") is None:
        raise InstallError(
            "torch and torchvision must be installed before detectron2: run `pip install torch torchvision`."
        )
    with tempfile.TemporaryDirectory() as temporary:
        archive = download(Path(temporary, "download"))
        verify(archive)
        project = Path(temporary, "project")
        repackage(archive, project)
        pip_install(project)
    importlib.invalidate_caches()
    print(f"Installed detectron2 {installed_version()} (Python only, from {SDIST}).")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        install()
    except InstallError as error:
        sys.exit(str(error))
