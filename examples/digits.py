"""What the recipes share: scikit-learn's handwritten digits, and a teacher trained on them in a second or two."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,297 images (64,) with their labels to train on, and 500 to test on."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.from_numpy(data.data).float()[order] / 16, torch.from_numpy(data.target).long()[order]
    return TensorDataset(images[500:], labels[500:]), TensorDataset(images[:500], labels[:500])


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def trained_teacher(train: TensorDataset) -> nn.Module:
    """A network of width 256, frozen. Your own recipe loads a checkpoint here."""
    images, labels = train.tensors
    with torch.random.fork_rng():
        torch.manual_seed(0)
        teacher = network(256)
        optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
        for _ in range(100):
            optimizer.zero_grad()
            F.cross_entropy(teacher(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
    return teacher.requires_grad_(False).eval()


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    logits: Tensor = model(images)
    return float((logits.argmax(1) == labels).float().mean())
