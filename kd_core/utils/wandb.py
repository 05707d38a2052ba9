"""Weights & Biases, for whoever asks for it: nothing here needs the package otherwise."""

import hashlib
from pathlib import Path
from typing import Any


def import_wandb() -> Any:
    """The wandb package.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError("WANDB.ENABLED is True, but the wandb package is not installed: pip install wandb") from error
    return wandb


def start_wandb(output_dir: str | Path, project: str, config: dict[str, Any]) -> Any:
    """A run of Weights & Biases that goes on where a run of the same folder stopped.

    Args:
        output_dir: where wandb keeps its files; its name is the run's name, its path the run's identity.
        project: wandb's project.
        config: the settings to show beside the run.

    Raises:
        ValueError: the wandb package is not installed.
    """
    output = Path(output_dir).absolute()
    identity = hashlib.sha256(str(output).encode()).hexdigest()[:16]
    options = {"project": project, "dir": str(output), "name": output.name, "id": identity, "resume": "allow"}
    return import_wandb().init(**options, config=config)
