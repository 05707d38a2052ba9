"""Distillation in transformers.Trainer, with DeepKD's optimizer and the Trainer's own clipping and accumulation.

    python examples/hf_trainer.py

The student is a ResNet of 20,000 parameters, built from a config: nothing is downloaded.
"""

import tempfile

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from digits import digits, trained_teacher
from kd_core import DKDLoss, backward_streams, deepkd_sgd, to_streams


class DistillationTrainer(Trainer):
    def __init__(self, teacher: nn.Module, loss: nn.Module, **options) -> None:
        super().__init__(**options)
        self.teacher, self.loss = teacher, loss

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: int | None = None):
        """The forward and backward passes of one micro-batch; the Trainer clips, steps and zeroes the gradients."""
        model.train()
        inputs = self._prepare_inputs(inputs)
        outputs = model(**inputs)
        with torch.no_grad():
            teacher_logits = self.teacher(inputs["pixel_values"].flatten(1))
        streams = to_streams(self.loss(outputs.logits, teacher_logits, inputs["labels"]), self.loss, outputs.loss)
        parts = self.current_gradient_accumulation_steps  # fewer at the end of an epoch
        streams = {name: value / parts for name, value in streams.items()}
        backward_streams(streams, self.optimizer, self.accelerator.scaler)  # a scaler with fp16=True, else None
        return outputs.loss.detach() / parts


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = default_collate(rows)
    return {"pixel_values": images.view(-1, 1, 8, 8), "labels": labels}


def main() -> None:
    torch.manual_seed(0)
    train, test = digits()
    config = ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10
    )
    student = ResNetForImageClassification(config)
    optimizer = deepkd_sgd(student.parameters(), lr=0.05, weight_decay=5e-4, step="matched")
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            num_train_epochs=6,
            per_device_train_batch_size=32,
            gradient_accumulation_steps=2,
            max_grad_norm=5.0,
            save_strategy="no",
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=True,
        )
        trainer = DistillationTrainer(
            teacher=trained_teacher(train),
            loss=DKDLoss(alpha=1.0, beta=2.0, temperature=2.0),
            model=student,
            args=options,
            train_dataset=train,
            eval_dataset=test,
            data_collator=collate,
            compute_metrics=lambda out: {"accuracy": float((out.predictions.argmax(1) == out.label_ids).mean())},
            optimizers=(optimizer, None),
        )
        before = trainer.evaluate()["eval_accuracy"]
        trainer.train()
        print(f"student {trainer.evaluate()['eval_accuracy']:.3f}, before {before:.3f}")


if __name__ == "__main__":
    main()
