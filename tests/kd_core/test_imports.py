"""What importing kd_core brings along, in a process of its own."""

import subprocess
import sys

import pytest

import kd_core

SHOW = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}), *sys.modules)"


def loaded_by(*statements: str) -> list[set[str]]:
    """What a process has loaded after each of the statements, which it executes in turn."""
    command = [sys.executable, "-c", "\n".join(f"{statement}\n{SHOW}" for statement in statements)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [set(line.split()) for line in lines]


def test_the_package_alone_imports_nothing_heavy() -> None:
    (names,) = loaded_by("import kd_core")
    assert not names & {"torch", "numpy", "fvcore", "yacs"}


def test_losses_import_torch_and_themselves_only_and_reading_a_config_fvcore() -> None:
    torch, losses, config = loaded_by(
        "import torch",
        "import kd_core.losses",
        "from kd_core.losses import LOSS_REGISTRY, add_loss_config, build_loss",
    )
    assert {name for name in losses - torch if not name.startswith("kd_core")} <= {"html", "html.entities"}
    assert {"kd_core.losses.config", "fvcore"} <= config


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
