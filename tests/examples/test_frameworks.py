"""The frameworks' own wrappers, clipping and checkpoints leave DeepKD's steps what they are in a plain loop."""

from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from kd_core import DKDLoss, backward_streams, deepkd_sgd, to_streams

LOSS = DKDLoss(alpha=1.0, beta=2.0)
STEPS, ROWS = 8, 4


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    images, teacher_logits = torch.randn(STEPS * ROWS, 6, generator=generator), torch.randn(STEPS * ROWS, 5)
    labels = torch.randint(5, (STEPS * ROWS,), generator=generator)
    return [
        {"images": image, "teacher_logits": logits, "labels": label}
        for image, logits, label in zip(images, teacher_logits, labels, strict=True)
    ]


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))

    def streams(self, images: Tensor, teacher_logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.layers(images)
        return to_streams(LOSS(logits, teacher_logits, labels), LOSS, F.cross_entropy(logits, labels))


def batch(data: list[dict[str, Tensor]], step: int) -> dict[str, Tensor]:
    chosen = data[step * ROWS : (step + 1) * ROWS]
    return {name: torch.stack([row[name] for row in chosen]) for name in chosen[0]}


def plain_loop(data: list[dict[str, Tensor]], max_norm: float) -> Student:
    student = Student()
    optimizer = deepkd_sgd(student.parameters(), lr=0.1)
    for step in range(STEPS):
        backward_streams(student.streams(**batch(data, step)), optimizer)
        assert optimizer.clip_grad_norm_(max_norm) > max_norm  # it acts in every step
        optimizer.step()
        optimizer.zero_grad()
    return student


class InOrder(Trainer):
    def _get_train_sampler(self, *_) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        streams = model.streams(**inputs)
        backward_streams(streams, self.optimizer)
        return streams["tog"].detach()


def hf_trainer(data: list[dict[str, Tensor]], folder: Path, max_norm: float) -> InOrder:
    student = Student()
    optimizer = deepkd_sgd(student.parameters(), lr=0.1)
    options = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=ROWS,
        max_grad_norm=max_norm,
        save_steps=STEPS // 2,
        lr_scheduler_type="constant",
        **options,
    )
    return InOrder(model=student, args=args, train_dataset=data, optimizers=(optimizer, None))


def test_the_hf_trainer_takes_the_steps_of_a_plain_loop_and_resumes_to_the_bit(tmp_path: Path) -> None:
    data, max_norm = rows(), 0.1
    whole = hf_trainer(data, tmp_path, max_norm)
    whole.train()
    for p, q in zip(whole.model.parameters(), plain_loop(data, max_norm).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    resumed = hf_trainer(data, tmp_path, max_norm)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert all(map(torch.equal, whole.model.state_dict().values(), resumed.model.state_dict().values()))


# By name: Lightning takes seconds to import, and only the process that runs this test needs it.
@pytest.mark.parametrize(
    "name", ["accelerate.optimizer:AcceleratedOptimizer", "pytorch_lightning.core.optimizer:LightningOptimizer"]
)
def test_the_optimizer_wrappers_of_accelerate_and_lightning_are_unwrapped(name: str) -> None:
    AcceleratorState(cpu=True)
    data, student, other = rows(), Student(), Student()
    wrapped, optimizer = (deepkd_sgd(m.parameters(), lr=0.1) for m in (student, other))
    wrapped = resolve_name(name)(wrapped)
    for step in range(2):
        backward_streams(student.streams(**batch(data, step)), wrapped)
        backward_streams(other.streams(**batch(data, step)), optimizer)
        for owner in (wrapped.optimizer, optimizer):
            owner.step()
            owner.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(student.parameters(), other.parameters(), strict=True))
