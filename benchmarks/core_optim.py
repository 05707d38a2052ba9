"""The optimizers' section of core.py: one update of a network's parameters, beside torch's own optimizers."""

from collections.abc import Callable, Iterator

import torch
import torchvision
from timing import Comparison, alternate
from torch import nn

from kd_core.optim import StreamAdamW, StreamOptimizer, StreamSGD, deepkd_sgd
from kd_core.streams import backward_streams

THREE = {"tog": 0.975, "tcg": 0.825, "ncg": 0.95}
EQUAL = {"tog": 0.9, "tcg": 0.9, "ncg": 0.9}
PAIR = {"tog": 0.95, "tcg": 0.85, "ncg": 0.95}
BOUND = {"resnet50": 0.8}


def optimizers(device: str, seconds: float) -> Iterator[Comparison]:
    """StreamSGD and StreamAdamW on the parameters of ResNets, every gradient being there already."""
    for network in ("resnet18", "resnet50"):

        def params(network: str = network) -> list[nn.Parameter]:
            return list(getattr(torchvision.models, network)().to(device).parameters())

        size = f"{network}, {sum(p.numel() for p in params()) / 1e6:.1f} M"
        foreach = stepping(torch.optim.SGD(params(), 1e-3, momentum=0.9, weight_decay=1e-4, foreach=True))
        fused = stepping(torch.optim.SGD(params(), 1e-3, momentum=0.9, weight_decay=1e-4, fused=True))
        adamw = stepping(torch.optim.AdamW(params(), 1e-3, foreach=True))
        two = filled(deepkd_sgd(params(), 1e-3, weight_decay=1e-4))
        three = filled(StreamSGD(params(), 1e-3, THREE, weight_decay=1e-4))
        one = stepping(StreamSGD(params(), 1e-3, EQUAL, weight_decay=1e-4))
        two_adamw = filled(StreamAdamW(params(), 1e-3, PAIR))
        pairs = [
            ("StreamSGD, 2 sets / SGD(foreach)", two.step, foreach, BOUND.get(network)),
            ("StreamSGD, 2 sets and p.grad / SGD(foreach)", showing_sum(two), foreach, None),
            ("StreamSGD, 3 sets / SGD(foreach)", three.step, foreach, None),
            ("StreamSGD, 1 set / SGD(foreach)", one, foreach, BOUND.get(network)),
            ("StreamSGD, 2 sets / SGD(fused)", two.step, fused, None),
            ("StreamAdamW, 2 sets / AdamW(foreach)", two_adamw.step, adamw, None),
        ]
        for name, ours, theirs, bound in pairs:
            yield Comparison(name, size, *alternate(ours, theirs, seconds), bound)


def stepping(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """The step of an optimizer with one gradient per parameter."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.randn_like(p)
    return optimizer.step


def filled(optimizer: StreamOptimizer) -> StreamOptimizer:
    """The optimizer with gradients in every set, of every parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    losses = {stream: sum((p * torch.randn_like(p)).sum() for p in params) for stream in ("tog", "tcg", "ncg")}
    backward_streams(losses, optimizer)
    return optimizer


def showing_sum(optimizer: StreamOptimizer) -> Callable[[], object]:
    """All that streams cost beside the backward passes: the sum that `p.grad` shows, and the step."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def step() -> None:
        optimizer.gradients.show(params)
        optimizer.step()

    return step
