"""GSNR of DeepKD's three streams on a small real classifier: scikit-learn's handwritten digits, teacher → student.

    python benchmarks/gsnr_digits.py [--seeds 3] [--epochs 20] [--lr 0.02]

A convolutional teacher is trained, then a student of 2,410 parameters under DKD with plain SGD. After some epochs the
GSNR is measured twice. "held": from the gradients of 400 random batches of 64 at fixed weights. "running": as
`AutoMomenta` sees it during training, one sample every 5 iterations since the previous row.
"""

import argparse
import statistics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kd_core.losses import DKDLoss
from kd_core.optim.gsnr import GradientSNR, suggest_momenta

STREAMS = ("tog", "tcg", "ncg")
MEASURED_EPOCHS = (1, 5, 10, 20)
BATCH = 64


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images (N, 64) and labels, in a fixed random split of 1,297 and 500."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 8 - 1, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:-500], order[-500:]
    return images[train], labels[train], images[test], labels[test]


def conv_teacher() -> nn.Sequential:
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(64 * 16, 10))


def small_student() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).float().mean().item()


def train_teacher(images: Tensor, labels: Tensor) -> nn.Module:
    teacher = conv_teacher()
    optimizer = torch.optim.SGD(teacher.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
    for _ in range(15):
        for rows in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(teacher(images[rows]), labels[rows]).backward()
            optimizer.step()
    return teacher.requires_grad_(False)


class Distillation:
    """A student, its teacher's logits, and the three losses of a batch."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.images, self.labels, *self.test = digits()
        self.teacher = train_teacher(self.images, self.labels)
        self.teacher_logits = self.teacher(self.images)
        self.student, self.loss = small_student(), DKDLoss(alpha=1.0, beta=8.0, temperature=4.0)

    def streams(self, rows: Tensor) -> dict[str, Tensor]:
        logits = self.student(self.images[rows])
        terms = self.loss(logits, self.teacher_logits[rows], self.labels[rows])
        task = nn.functional.cross_entropy(logits, self.labels[rows])
        return {"tog": task, "tcg": terms["tckd"], "ncg": terms["nckd"]}

    def held(self, batches: int = 400) -> dict[str, float]:
        gsnr = GradientSNR(self.student.named_parameters(), STREAMS)
        for _ in range(batches):
            gsnr.update(self.streams(torch.randint(len(self.images), (BATCH,))))
        return gsnr.overall()

    def measure(self, epochs: int, lr: float) -> list[tuple[int, float, dict[str, float], dict[str, float]]]:
        """(epoch, test accuracy, GSNR at fixed weights, GSNR during training) after the epochs to be measured."""
        optimizer = torch.optim.SGD(self.student.parameters(), lr, momentum=0.9, weight_decay=5e-4)
        rows_of_table, iteration = [], 0
        running = GradientSNR(self.student.named_parameters(), STREAMS, every=5)
        for epoch in range(1, epochs + 1):
            for rows in torch.randperm(len(self.images)).split(BATCH):
                losses = self.streams(rows)
                running.observe(losses, iteration)
                optimizer.zero_grad()
                sum(losses.values()).backward()
                optimizer.step()
                iteration += 1
            if epoch in MEASURED_EPOCHS:
                rows_of_table.append((epoch, accuracy(self.student, *self.test), self.held(), running.overall()))
                running = GradientSNR(self.student.named_parameters(), STREAMS, every=5)
        return rows_of_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.02, help="the student's learning rate")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    runs = []
    for seed in range(arguments.seeds):
        distillation = Distillation(seed)
        runs.append(distillation.measure(arguments.epochs, arguments.lr))
        print(f"seed {seed}: teacher {accuracy(distillation.teacher, *distillation.test):.1f} % on the test digits")
    print(
        "\n| epoch | student, % | GSNR | tog | tcg | ncg | momenta it suggests (tog, tcg, ncg) |\n" + "|---" * 7 + "|"
    )
    for of_epoch in zip(*runs, strict=True):
        epoch, top1 = of_epoch[0][0], statistics.mean(row[1] for row in of_epoch)
        for name, column in (("held", 2), ("running", 3)):
            gsnr = {s: statistics.mean(row[column][s] for row in of_epoch) for s in STREAMS}
            momenta = ", ".join(f"{m:.3f}" for m in suggest_momenta(gsnr).values())
            print(
                f"| {epoch} | {top1:.1f} | {name} | "
                + " | ".join(f"{g:.4f}" for g in gsnr.values())
                + f" | {momenta} |"
            )


if __name__ == "__main__":
    main()
