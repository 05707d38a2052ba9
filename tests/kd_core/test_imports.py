"""What importing kd_core brings along, in a process of its own."""

import subprocess
import sys

import pytest

import kd_core

LOADED = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}), *sys.modules)"


def loaded_by(statement: str) -> set[str]:
    command = [sys.executable, "-c", f"{statement}\n{LOADED}"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_the_package_alone_imports_nothing_heavy() -> None:
    assert not loaded_by("import kd_core") & {"torch", "numpy", "fvcore", "yacs"}


def test_losses_import_torch_and_themselves_only() -> None:
    more = loaded_by("import kd_core.losses") - loaded_by("import torch")
    assert {name for name in more if not name.startswith("kd_core")} <= {"html", "html.entities"}


def test_a_config_is_read_with_fvcore_which_is_imported_then() -> None:
    names = loaded_by("from kd_core.losses import LOSS_REGISTRY, add_loss_config, build_loss")
    assert {"kd_core.losses.config", "fvcore"} <= names


def test_every_name_at_the_top_is_there_and_listed() -> None:
    for name in kd_core.__all__:
        assert getattr(kd_core, name) is not None
        assert name in dir(kd_core)
    assert {"DKDLoss", "KDLoss", "deepkd_sgd", "backward_streams", "to_streams", "flatten_rows"} <= set(kd_core.__all__)


def test_a_name_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'kd_core' has no attribute 'NoSuchLoss'"):
        _ = kd_core.NoSuchLoss
    with pytest.raises(AttributeError, match=r"module 'kd_core\.losses' has no attribute 'NoSuchLoss'"):
        _ = kd_core.losses.NoSuchLoss
