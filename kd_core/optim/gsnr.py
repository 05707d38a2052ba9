"""Gradient signal-to-noise ratio of the streams, and the momenta that it suggests."""

import logging
import math
import random
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kd_core.distributed import is_sharded, refuse_fsdp1, world_size
from kd_core.optim.base import MOMENTA, StreamOptimizer

logger = logging.getLogger(__name__)


class GradientSNR:
    """How much of a stream's gradient is the same from batch to batch, and how much is noise.

    GSNR of parameter j is E[g_j]² / Var[g_j] over batches (arXiv 2001.07384). Over a layer, or all layers, the ratio of
    sums, with the variance s²/n of the mean ḡ of n samples taken off, which else passes for signal::

        GSNR = Σ_j (ḡ_j² − s_j²/n) / Σ_j s_j²

    ḡ and s² are running (Welford, in place): two buffers of the sampled parameters per stream, in at least float32.
    Each sample costs one backward pass per stream; `p.grad` and the graph stay as they are. While the weights move,
    what they change in E[g] counts as noise (ours: the paper holds them). Activation checkpointing has to be
    non-reentrant.

    Args:
        named_parameters: as `model.named_parameters()`; a parameter's name is its layer's.
        streams: names of the streams.
        every: `observe` takes a sample where the iteration is a multiple of this.
        sample: share of each tensor's elements that is measured, in (0, 1].
        seed: which elements those are.
    Raises:
        ValueError: `sample` out of (0, 1], `every` below 1, no parameter, parameters sharded by FSDP.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        streams: Iterable[str] = ("tog", "tcg", "ncg"),
        every: int = 200,
        sample: float = 1.0,
        seed: int = 0,
    ) -> None:
        if not 0 < sample <= 1:
            raise ValueError(f"sample is {sample}: it is a share of each tensor, in (0, 1]")
        if every < 1:
            raise ValueError(f"every is {every}: it must be at least 1")
        self.params = {name: p for name, p in named_parameters if p.requires_grad}
        if not self.params:
            raise ValueError("named_parameters has no parameter that requires a gradient")
        refuse_fsdp1(self.params.values())
        if any(map(is_sharded, self.params.values())):
            raise ValueError("GSNR cannot be measured on parameters sharded by fully_shard: set the momenta by hand")
        self.every, self.stride = every, next_prime(1 / sample)
        # A prime stride is in step with no dimension of a weight: it meets every tap of every kernel.
        offsets = random.Random(seed)
        self._offsets = [offsets.randrange(min(self.stride, p.numel())) for p in self.params.values()]
        device = next(iter(self.params.values())).device
        self._counts = {stream: torch.zeros((), dtype=torch.int64, device=device) for stream in streams}
        self._mean = {stream: self._zeros() for stream in self._counts}
        self._squares = {stream: self._zeros() for stream in self._counts}  # Σ (g − ḡ)²

    @property
    def count(self) -> dict[str, int]:
        """The samples of each stream. Reading them waits for the device, which taking them does not."""
        return {stream: int(count) for stream, count in self._counts.items()}

    def observe(self, losses: Mapping[str, Tensor | None], iteration: int, scale: Tensor | float = 1.0) -> bool:
        """A sample, if it is time for one: call it before `backward_streams`, with the same losses. Returns whether."""
        if iteration % self.every:
            return False
        self.update(losses, scale)
        return True

    def update(self, losses: Mapping[str, Tensor | None], scale: Tensor | float = 1.0) -> None:
        """One sample of every stream that has a loss.

        Args:
            losses: {stream: scalar loss}.
            scale: multiplies the losses and is divided out of the gradients, for fp16. Infinite gradients are left out.
        Raises:
            ValueError: an unknown stream.
        """
        for stream, loss in losses.items():
            if stream not in self._counts:
                raise ValueError(f"unknown stream {stream!r}: the streams are {', '.join(self._counts)}")
            if loss is not None and loss.requires_grad:
                gradients = torch.autograd.grad(
                    loss * scale, self.params.values(), retain_graph=True, allow_unused=True
                )
                self._add(stream, self._sampled(gradients, scale))

    @torch.no_grad()
    def _add(self, stream: str, gradients: list[Tensor]) -> None:
        count, mean, squares = self._counts[stream], self._mean[stream], self._squares[stream]
        finite = torch.stack([g.isfinite().all().to(count.device) for g in gradients]).all()
        count += finite  # the host need not know
        for g, running, square in zip(gradients, mean, squares, strict=True):
            g = torch.where(finite.to(g.device), g, running)  # an infinite sample moves nothing
            delta = g - running
            running += delta / count.clamp(min=1).to(g.device)
            square.addcmul_(delta, g - running)

    def _sampled(self, gradients: Iterable[Tensor | None], scale: Tensor | float) -> list[Tensor]:
        sampled = []
        for g, zero, offset in zip(gradients, self._zeros(), self._offsets, strict=True):
            sampled.append(zero if g is None else g.reshape(-1)[offset :: self.stride].to(zero.dtype) / scale)
        return sampled

    def _zeros(self) -> list[Tensor]:
        return [
            torch.zeros_like(
                p.detach().reshape(-1)[offset :: self.stride], dtype=torch.promote_types(p.dtype, torch.float32)
            )
            for p, offset in zip(self.params.values(), self._offsets, strict=True)
        ]

    def signal_and_noise(self) -> Tensor:
        """Σ (ḡ² − s²/n) and Σ s² of every stream and layer: (streams, layers, 2), float64. NaN below two samples."""
        rows = []
        for stream, n in self.count.items():
            for mean, squares in zip(self._mean[stream], self._squares[stream], strict=True):
                if mean.device.type == "mps":  # which has no float64
                    mean, squares = mean.cpu(), squares.cpu()
                noise = squares.double().sum() / (n - 1 if n > 1 else math.nan)
                rows.append(torch.stack([mean.double().square().sum() - noise / max(n, 1), noise]).cpu())
        return torch.stack(rows).reshape(len(self._counts), len(self.params), 2)

    def overall(self) -> dict[str, float]:
        """The GSNR of each stream over all parameters; NaN below two samples."""
        sums = self.signal_and_noise().sum(1)
        return {stream: ratio(*row) for stream, row in zip(self._counts, sums.tolist(), strict=True)}

    def per_layer(self) -> dict[str, dict[str, float]]:
        """{stream: {name of the parameter: GSNR}}; 0 where a stream does not reach it."""
        sums = self.signal_and_noise().tolist()
        return {
            stream: {name: ratio(*row) for name, row in zip(self.params, rows, strict=True)}
            for stream, rows in zip(self._counts, sums, strict=True)
        }

    def release(self) -> None:
        """Free the running means, twice the sampled elements for each stream; `count` is all that remains."""
        self._mean = self._squares = {}

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self._mean, "squares": self._squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError where the state lacks a stream, or has other sampled elements; it may have more streams."""
        sizes = {stream: [t.shape for t in tensors] for stream, tensors in self._mean.items()}
        if sizes != {stream: [t.shape for t in state["mean"].get(stream, ())] for stream in sizes}:
            raise ValueError("this GSNR state has other streams, parameters or another sample= than was asked for")
        for stream, count in self._counts.items():
            count.fill_(state["count"][stream])
        for mine, saved in ((self._mean, state["mean"]), (self._squares, state["squares"])):
            for stream, tensors in mine.items():
                torch._foreach_copy_(tensors, saved[stream])


def ratio(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf if signal > 0 else 0.0
    return signal / noise


def next_prime(at_least: float) -> int:
    """The smallest prime not below; 1 for 1."""
    n = math.ceil(at_least - 1e-9)
    while any(n % d == 0 for d in range(2, math.isqrt(n) + 1)):
        n += 1
    return n


def suggest_momenta(gsnr: Mapping[str, float], base: float = 0.9, span: float = 0.075) -> dict[str, float]:
    """Momenta that rise with the GSNR, as DeepKD (arXiv 2505.15133) finds the best ones to; the rule is ours::

        x = log2(GSNR / geometric mean of all), in [−1, 1];  momentum = base + span · x, in steps of span / 3

    So twice the mean GSNR gets base + span, half of it base − span, and streams of like GSNR share a momentum, and with
    it a backward pass. A GSNR ≤ 0 (its estimate may be) counts as a thousandth of the largest.

    Raises:
        ValueError: a GSNR that is not finite; base ± span outside [0, 1).
    """
    if span < 0 or base - span < 0 or base + span >= 1:
        raise ValueError(f"base {base} ± span {span}: momenta must be in [0, 1)")
    for stream, value in gsnr.items():
        if not math.isfinite(value):
            raise ValueError(f"the GSNR of stream {stream!r} is {value}: measure at least two batches of it")
    largest = max(gsnr.values(), default=0.0)
    if largest <= 0:
        return dict.fromkeys(gsnr, base)
    logs = {stream: math.log2(max(value, largest / 1000)) for stream, value in gsnr.items()}
    middle = sum(logs.values()) / len(logs)
    return {stream: base + span * round(3 * min(max(x - middle, -1.0), 1.0)) / 3 for stream, x in logs.items()}


class AutoMomenta:
    """`momenta: auto`: measures the streams' GSNR during a warm-up window, then sets an optimizer's momenta, once.

    Until then the optimizer trains with the momenta it was built with. Under `torch.distributed` every rank measures
    its own batches, and all set the same momenta, from the sums over the ranks. It says in the log when it sets them.

    Args:
        optimizer: whose `set_momenta` is called (all groups alike).
        named_parameters: as `model.named_parameters()`.
        warmup: momenta are set at the first sampling iteration from here on that finds two samples of every stream.
        every, sample: as in `GradientSNR`.
        base, span: as in `suggest_momenta`.
        streams: those that the losses have, by default all of the optimizer's. The others keep their momenta.
    Raises:
        ValueError: fewer than two samples fit into the warm-up; what `GradientSNR` and `suggest_momenta` refuse.
    """

    def __init__(
        self,
        optimizer: StreamOptimizer,
        named_parameters: Iterable[tuple[str, Tensor]],
        warmup: int = 4000,
        every: int = 200,
        sample: float = 1.0,
        base: float = 0.9,
        span: float = 0.075,
        streams: Collection[str] | None = None,
    ) -> None:
        if warmup <= every:
            raise ValueError(f"warmup {warmup} holds fewer than two samples at every {every} iterations: lengthen it")
        suggest_momenta({}, base, span)
        self.optimizer, self.warmup, self.base, self.span = optimizer, warmup, base, span
        measured = [s for s in optimizer.param_groups[0][MOMENTA] if streams is None or s in streams]
        self.gsnr = GradientSNR(named_parameters, measured, every, sample)
        self.momenta: dict[str, float] | None = None  # once they are set
        self.measured: dict[str, float] | None = None  # the GSNR that they were set from, in this process

    def observe(self, losses: Mapping[str, Tensor | None], iteration: int, scale: Tensor | float = 1.0) -> None:
        """Call it in every iteration, before `backward_streams`, with gradients at zero."""
        if self.momenta is not None or iteration % self.gsnr.every:
            return
        if iteration < self.warmup or not self._set_momenta(iteration):
            self.gsnr.update(losses, scale)

    def _set_momenta(self, iteration: int) -> bool:
        sums = self.gsnr.signal_and_noise().sum(1)
        if world_size() > 1:
            device = "cpu" if "cpu:" in dist.get_backend_config() else next(iter(self.gsnr.params.values())).device
            sums = sums.to(device)
            dist.all_reduce(sums)
        if sums.isnan().any():
            return False  # a stream, on some rank, has fewer than two samples yet
        gsnr = {stream: ratio(*row) for stream, row in zip(self.gsnr.count, sums.tolist(), strict=True)}
        self.momenta = self.optimizer.param_groups[0][MOMENTA] | suggest_momenta(gsnr, self.base, self.span)
        self.optimizer.set_momenta(self.momenta)
        self.measured = gsnr
        self.gsnr.release()
        found = ", ".join(f"{s}: GSNR {value:.4g}, momentum {self.momenta[s]:.4g}" for s, value in gsnr.items())
        logger.info("Momenta set at iteration %d from %s samples (%s)", iteration, max(self.gsnr.count.values()), found)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"momenta": self.momenta, "gsnr": None if self.momenta else self.gsnr.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.momenta = state["momenta"]
        if state["gsnr"] is not None:
            self.gsnr.load_state_dict(state["gsnr"])
        elif self.momenta is not None:
            self.gsnr.release()
