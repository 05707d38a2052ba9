"""Weights & Biases; the package is imported only where WANDB.ENABLED asks for it."""

import hashlib
from pathlib import Path
from typing import Any

from kd_core.utils.errors import UserError


def import_wandb() -> Any:
    """The wandb package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError("WANDB.ENABLED is True, but the wandb package is not installed: pip install wandb") from error
    return wandb


def start_wandb(output_dir: str | Path, project: str, config: dict[str, Any]) -> Any:
    """Start a run of Weights & Biases, or continue the run of the same folder.

    Args:
        output_dir: where wandb keeps its files; its name is the run's name, its path the run's identity.
        project: the project's name there.
        config: the settings to show beside the run.

    Raises:
        UserError: the wandb package is not installed.
    """
    output = Path(output_dir).absolute()
    identity = hashlib.sha256(str(output).encode()).hexdigest()[:16]
    options = {"project": project, "dir": str(output), "name": output.name, "id": identity, "resume": "allow"}
    return import_wandb().init(**options, config=config)
