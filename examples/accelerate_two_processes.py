"""Distillation with accelerate in two processes: prepared, clipped, saved and resumed by accelerate's own functions.

    torchrun --nproc-per-node 2 examples/accelerate_two_processes.py

The run that is stopped after two epochs and resumed ends with the weights of the run that is not.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, broadcast_object_list, set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from digits import accuracy, digits, network, trained_teacher
from kd_core import DKDLoss, backward_streams, deepkd_sgd, to_streams


def train(teacher: nn.Module, data: Dataset, folder: str, epochs: range) -> nn.Module:
    """Trains the given epochs, from the state in the folder unless they start at 0, and saves the state there."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True))
    set_seed(0)
    student = network(width=16)
    loss = DKDLoss(alpha=1.0, beta=2.0, temperature=2.0)
    optimizer = deepkd_sgd(student.parameters(), lr=0.05, weight_decay=5e-4, step="matched")
    loader = DataLoader(data, batch_size=32, shuffle=True)  # for each process
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    if epochs.start > 0:
        accelerator.load_state(folder)
    for epoch in epochs:
        loader.set_epoch(epoch)
        for images, labels in loader:
            with accelerator.no_sync(student):  # backward_streams averages every stream over the processes
                logits = student(images)
            streams = to_streams(loss(logits, teacher(images), labels), loss, F.cross_entropy(logits, labels))
            backward_streams(streams, optimizer, accelerator.scaler)  # in place of accelerator.backward(loss)
            accelerator.clip_grad_norm_(student.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state(folder)
    return accelerator.unwrap_model(student)


def main() -> None:
    accelerator, (data, test) = Accelerator(cpu=True), digits()
    teacher = trained_teacher(data)
    with tempfile.TemporaryDirectory() as folder:
        (folder,) = broadcast_object_list([folder])  # the first process's, for all
        whole = train(teacher, data, f"{folder}/whole", range(6))
        train(teacher, data, f"{folder}/stopped", range(2))
        resumed = train(teacher, data, f"{folder}/stopped", range(2, 6))
        accelerator.wait_for_everyone()
    is_same = all(map(torch.equal, whole.state_dict().values(), resumed.state_dict().values()))
    accelerator.print(f"{accelerator.num_processes} processes: student {accuracy(whole, test):.3f}")
    accelerator.print(f"stopped and resumed: student {accuracy(resumed, test):.3f}, the same weights: {is_same}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
