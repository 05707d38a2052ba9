"""The installer: keeps what is there, refuses what it does not know, and says each in one sentence."""

import importlib.util
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from detectron2 import model_zoo

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "install_detectron2.py"
spec = importlib.util.spec_from_file_location("install_detectron2", SCRIPT)
installer = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
spec.loader.exec_module(installer)


def test_a_detectron2_that_any_process_imports_is_kept_and_has_its_model_zoo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    before = metadata.version("detectron2")
    installer.install()  # which imports it in a process of its own
    assert "is there already; kept as it is." in capsys.readouterr().out
    assert metadata.version("detectron2") == before
    assert model_zoo.get_config("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml").MODEL.RESNETS.DEPTH == 101


def test_a_wrong_hash_is_refused(tmp_path):
    archive = tmp_path / "detectron2_cdo-0.5.tar.gz"
    archive.write_bytes(b"something else")
    with pytest.raises(
        installer.InstallError, match=rf"has SHA-256 \w+, expected {installer.SHA256}: refusing to install it"
    ):
        installer.verify(archive)


def test_unexpected_sources_are_refused(tmp_path):
    first = tmp_path / installer.REPAIRS[0].file
    first.parent.mkdir(parents=True)
    first.write_text("nothing to repair here\n")
    with pytest.raises(installer.InstallError, match="unexpected sources"):
        installer.repair(tmp_path)


def test_without_an_index_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(installer.InstallError, match=r"Could not fetch detectron2-cdo==0.5: no package index answered"):
        installer.download(tmp_path)


def test_a_compiled_operator_that_is_missing_names_itself_and_the_fix():
    namespace: dict = {}
    exec(installer.C_MODULE, namespace)
    with pytest.raises(
        AttributeError,
        match=r"detectron2._C.deform_conv_forward is a compiled operator .* install a compiled upstream build",
    ):
        namespace["__getattr__"]("deform_conv_forward")


def test_every_tool_can_be_run_as_it_is():
    for path in (ROOT / "tools").glob("*.py"):
        assert os.access(path, os.X_OK) and path.read_text().startswith("#!/usr/bin/env python"), path


def test_without_pip_it_says_how_to_get_it(tmp_path):
    """In a virtual environment that was made without ensurepip, as on a Debian without python3-venv."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [tmp_path / "venv" / "bin" / "python", SCRIPT]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=bare)
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "has no pip, which installs detectron2" in run.stderr and "python3-venv" in run.stderr
