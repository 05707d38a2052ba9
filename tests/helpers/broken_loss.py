"""Run a command with LOSS.NAME broken, a loss that has a bug: `python broken_loss.py zip|torch COMMAND.py WORDS…`."""

import runpy
import sys

import torch
from torch import Tensor

from kd_core.losses import LOSS_REGISTRY, KDLoss

error, *sys.argv = sys.argv[1:]


class Broken(KDLoss):
    """Raises what a bug raises, when the first batch comes."""

    def row_terms(self, *args: Tensor, **options: Tensor) -> dict[str, Tensor]:
        if error == "zip":
            return dict(zip(self.terms, [], strict=True))
        return {"tckd": torch.zeros(2) @ torch.zeros(3)}


@LOSS_REGISTRY.register()
def broken(cfg: object) -> Broken:
    return Broken()


runpy.run_path(sys.argv[0], run_name="__main__")
