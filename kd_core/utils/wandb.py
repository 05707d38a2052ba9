"""Weights & Biases; the package is imported only where WANDB.ENABLED asks for it."""

import secrets
from pathlib import Path
from typing import Any

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text

RUN = "wandb_run.txt"  # in OUTPUT_DIR: the identity of its run, for --resume


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


def start_wandb(output_dir: str | Path, project: str, config: dict[str, Any], start_iter: int) -> Any:
    """Start a run of Weights & Biases; a resumed training continues the run of its folder.

    Args:
        output_dir: where wandb keeps its files; its name is the run's name.
        project: the project's name there.
        config: the settings to show beside the run.
        start_iter: above 0 the training is resumed. A new training has a new run, also in a used folder: wandb drops
            what is logged below an old run's last step.

    Raises:
        UserError: the wandb package is not installed.
    """
    wandb = import_wandb()
    output = Path(output_dir).absolute()
    file = output / RUN
    if start_iter == 0 or not file.is_file():
        write_text(file, secrets.token_hex(8))
    identity = file.read_text().strip()
    return wandb.init(
        project=project, dir=str(output), name=output.name, id=identity, resume="allow", config=config
    )
