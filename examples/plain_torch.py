"""Distillation in a plain PyTorch loop: DKD's loss and DeepKD's optimizer, one momentum per gradient stream.

    python examples/plain_torch.py

backward_streams replaces loss.backward(); all else is the usual loop.
"""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from digits import accuracy, digits, network, trained_teacher
from kd_core import DKDLoss, backward_streams, deepkd_sgd, to_streams

EPOCHS = 10


def main() -> None:
    torch.manual_seed(0)
    train, test = digits()
    teacher, student = trained_teacher(train), network(width=16)
    loss = DKDLoss(alpha=1.0, beta=2.0, temperature=2.0)
    # step="matched" keeps the step size of plain SGD with momentum 0.9, so its learning rate holds.
    optimizer = deepkd_sgd(student.parameters(), lr=0.05, weight_decay=5e-4, step="matched")
    print(f"before: student {accuracy(student, test):.3f}, teacher {accuracy(teacher, test):.3f}")
    for epoch in range(EPOCHS):
        for images, labels in DataLoader(train, batch_size=64, shuffle=True):
            logits = student(images)
            with torch.no_grad():
                teacher_logits = teacher(images)
            terms = loss(logits, teacher_logits, labels, progress=epoch / EPOCHS)  # {"tckd": …, "nckd": …}
            streams = to_streams(terms, loss, task_loss=F.cross_entropy(logits, labels))
            backward_streams(streams, optimizer)
            optimizer.clip_grad_norm_(5.0)
            optimizer.step()
            optimizer.zero_grad()
    print(f"after: student {accuracy(student, test):.3f}")


if __name__ == "__main__":
    main()
