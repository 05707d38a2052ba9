"""Distillation in Lightning by manual optimization, stopped after two epochs and resumed from a checkpoint.

    python examples/lightning_manual.py

The run that is stopped and resumed ends with the weights of the run that is not.
"""

import tempfile

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from digits import accuracy, digits, network, trained_teacher
from kd_core import DKDLoss, StreamSGD, backward_streams, deepkd_sgd, to_streams

TRAIN, TEST = digits()
TEACHER = trained_teacher(TRAIN)


class Distillation(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # training_step runs the backward passes and the step
        self.student = network(width=16)
        self.loss = DKDLoss(alpha=1.0, beta=2.0, temperature=2.0)

    def training_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        optimizer, logits = self.optimizers(), self.student(images)
        terms = self.loss(logits, TEACHER(images), labels)
        optimizer.zero_grad()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # of precision="16-mixed"
        backward_streams(to_streams(terms, self.loss, F.cross_entropy(logits, labels)), optimizer, scaler)
        optimizer.optimizer.clip_grad_norm_(5.0)  # in any precision; Lightning's own refuses it under a mixed one
        optimizer.step()

    def configure_optimizers(self) -> StreamSGD:
        return deepkd_sgd(self.student.parameters(), lr=0.05, weight_decay=5e-4, step="matched")


def fit(epochs: int, folder: str, checkpoint: str | None = None) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet)
    trainer.fit(Distillation(), DataLoader(TRAIN, batch_size=64), ckpt_path=checkpoint)
    return trainer


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole = fit(6, folder).lightning_module.student
        fit(2, folder).save_checkpoint(f"{folder}/stopped.ckpt")
        resumed = fit(6, folder, f"{folder}/stopped.ckpt").lightning_module.student
    is_same = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    print(f"student {accuracy(whole, TEST):.3f}")
    print(f"stopped and resumed: student {accuracy(resumed, TEST):.3f}, the same weights: {is_same}")


if __name__ == "__main__":
    main()
