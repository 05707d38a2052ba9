"""What a rank sends in a step, counted in two real gloo processes: (sets) × (trainable parameters) × 4 bytes."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn

from kd_core.optim import StreamSGD
from kd_core.streams import backward_streams

RANKS = 2
# Momenta of (tog, tcg, ncg) by the number of sets that they make.
MOMENTA = {1: (0.9, 0.9, 0.9), 2: (0.975, 0.825, 0.975), 3: (0.975, 0.825, 0.95)}


def count(build: Callable[[], nn.Module] | None = None) -> tuple[int, dict[int, list[int]]]:
    """Trainable parameters of a network, and by number of sets what each rank sends in a step.

    Args:
        build: a picklable function that gives the network: images (N, 3, 64, 64) → logits; by default `half_frozen`.
    """
    build = build or half_frozen
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(rank_main, (folder, build), nprocs=RANKS)
        of_rank = [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(RANKS)]
    trainable = sum(p.numel() for p in build().parameters() if p.requires_grad)
    return trainable, {sets: [sent[sets] for sent in of_rank] for sets in MOMENTA}


def half_frozen() -> nn.Module:
    """A ResNet-18 whose stem and first stage are frozen, with a parameter that no loss reaches."""
    model = torchvision.models.resnet18(num_classes=100)
    for module in (model.conv1, model.bn1, model.layer1):
        module.requires_grad_(False)
    model.unused = nn.Parameter(torch.zeros(1000))
    return model


def rank_main(rank: int, folder: str, build: Callable[[], nn.Module]) -> None:
    """One process: a step with every number of sets; saves what its optimizers counted."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model, images = build(), torch.randn(2, 3, 64, 64)
    sent = {}
    for sets, momenta in MOMENTA.items():
        optimizer = StreamSGD(model.parameters(), 0.0, dict(zip(("tog", "tcg", "ncg"), momenta, strict=True)))
        backward_streams(losses(model(images)), optimizer)
        sent[sets] = optimizer.gradients.bytes_sent
        optimizer.zero_grad()
    torch.save(sent, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


def losses(logits: Tensor) -> dict[str, Tensor]:
    """A loss a stream."""
    return {"tog": logits.square().mean(), "tcg": logits.exp().mean(), "ncg": logits.logsumexp(1).mean()}
