"""What StreamSGD and StreamAdamW share: momenta by stream in every group, checked gradients, clipping, state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.streams import StreamGradients, StreamSets, stream_sets

MOMENTA = "momenta"


def label(streams: Iterable[str]) -> str:
    """The name of a set in `state_dict()`: its streams, joined."""
    return "+".join(streams)


class StreamOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradient arrives in several streams, each with its momentum (see `kd_core.streams.backward_streams`).

    Every parameter group has `momenta` {stream: momentum}, of the same streams in all groups. Streams of equal momentum form
    a *set*, with one buffer a parameter: `state[p][BUFFERS][label]`. Sets follow from the groups' momenta and are never stored.
    """

    BUFFERS = "momentum_buffers"

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.gradients = StreamGradients()
        self._buffer_sets: StreamSets | None = None  # the sets that the buffers are known to follow
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.gradients = StreamGradients()
        self._buffer_sets = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler: `step` reads `found_inf` and `grad_scale` itself, without a synchronisation where the kernel can."""
        return True

    @property
    def stream_sets(self) -> StreamSets:
        """Streams that share a backward pass and a buffer (`kd_core.streams.stream_sets`)."""
        return stream_sets([group[MOMENTA] for group in self.param_groups])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        merged = {**self.defaults, **param_group}
        self._check_group(merged)
        super().add_param_group({**param_group, MOMENTA: dict(merged[MOMENTA])})

    def _check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError for a hyperparameter out of its range."""
        if not group["lr"] >= 0:
            raise ValueError(f"lr is {group['lr']}: it must be ≥ 0")
        if not group["weight_decay"] >= 0:
            raise ValueError(f"weight_decay is {group['weight_decay']}: it must be ≥ 0")
        self._check_momenta(group[MOMENTA])

    def _check_momenta(self, momenta: Mapping[str, float]) -> None:
        if not momenta:
            raise ValueError(
                "momenta is empty: give a momentum for each stream, as {'tog': .975, 'tcg': .825, 'ncg': .975}"
            )
        for stream, momentum in momenta.items():
            if not 0 <= momentum < 1:
                raise ValueError(f"the momentum of stream {stream!r} is {momentum}: it must be in [0, 1)")
        for stream in self.defaults[MOMENTA]:
            if stream not in momenta:
                raise ValueError(
                    f"stream {stream!r} is missing from momenta {dict(momenta)}: every group names every stream"
                )
        for stream in momenta:
            if stream not in self.defaults[MOMENTA]:
                raise ValueError(
                    f"unknown stream {stream!r} in momenta: the streams are {', '.join(self.defaults[MOMENTA])}"
                )

    def set_momenta(self, momenta: Mapping[str, float]) -> None:
        """Sets the momenta of every group, between a step and the next backward pass.

        Where that splits a set, the whole buffer stays with the decay stream's part (else its first stream's), and the other
        part starts at 0; where sets merge, their buffers add.

        Raises:
            ValueError: a stream missing or unknown, a momentum outside [0, 1).
        """
        self._check_momenta(momenta)
        for group in self.param_groups:
            group[MOMENTA] = {stream: momenta[stream] for stream in group[MOMENTA]}

    def _heir(self, streams: tuple[str, ...], group: Mapping[str, Any]) -> str:
        """The stream that keeps the buffer of `streams` when the set is split."""
        return group["decay_stream"] if group.get("decay_stream") in streams else streams[0]

    def _regroup_buffers(self, sets: StreamSets) -> None:
        """Moves every buffer to the set that its heir is in now."""
        if sets == self._buffer_sets:
            return
        new_label = {stream: label(streams) for streams in sets for stream in streams}
        for group in self.param_groups:
            for p in group["params"]:
                old = self.state[p].get(self.BUFFERS, {}) if p in self.state else {}
                if all(name in new_label.values() for name in old):
                    continue
                new: dict[str, Tensor] = {}
                for name, buffer in old.items():
                    to = new_label[self._heir(tuple(name.split("+")), group)]
                    new[to] = new[to] + buffer if to in new else buffer
                self.state[p][self.BUFFERS] = new
        self._buffer_sets = sets

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every stream; `set_to_none=False` makes them 0, so momentum and decay go on."""
        if set_to_none or len(self.gradients.sets) < 2:
            self.gradients.clear()
            super().zero_grad(set_to_none)
        elif self.gradients.shown:
            torch._foreach_zero_(self.gradients.tensors())
            self.gradients.record({p: total for p, (total, _) in self.gradients.shown.items()})

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales every stream by one factor, so that the norm of their sum is at most `max_norm`; returns the norm before.

        Under a GradScaler the gradients are unscaled first, whether or not `scaler.unscale_(optimizer)` was called.
        """
        self._check_gradients()
        self._unscale_for_clipping()
        shown = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(shown, norm_type, error_if_nonfinite)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if factor.device.type == "cpu" and factor >= 1:
            return norm  # nothing to do, and on the CPU we may know it
        tensors = self.gradients.tensors() if len(self.stream_sets) > 1 else shown
        by_device: dict[torch.device, list[Tensor]] = {}
        for t in tensors:
            by_device.setdefault(t.device, []).append(t)
        for device, on_device in by_device.items():
            torch._foreach_mul_(on_device, factor.to(device))
        self.gradients.record({p: total for p, (total, _) in self.gradients.shown.items()})
        return norm

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _check_gradients(self) -> StreamSets:
        sets = self.stream_sets
        if len(sets) > 1:
            self.gradients.check(self._params(), sets)
        return sets

    def _unscale_for_clipping(self) -> None:
        scaler = self.gradients.scaler
        if scaler is None or self.gradients.unscaled:
            return
        try:
            scaler.unscale_(self)  # p.grad, and the scaler's record of infinities
        except RuntimeError as error:
            if "already been called" not in str(error):
                raise
        self._unscale_streams()

    def _unscale_streams(self) -> None:
        """Divides the streams by the loss scale. `p.grad` is the scaler's (it is the only gradient when there is one set)."""
        gradients = self.gradients
        if len(gradients.sets) > 1 and not gradients.unscaled and gradients.scale is not None:
            inverse = gradients.scale.double().reciprocal().float()
            for gradient in gradients.of_set:
                _foreach_mul_by_device(list(gradient.values()), inverse)
        gradients.unscaled = True

    def _gradients_for_step(self) -> tuple[StreamSets, list[dict[Tensor, Tensor]]]:
        """The sets and their gradients, checked and unscaled."""
        sets = self._check_gradients()
        self._regroup_buffers(sets)
        scaled = self.gradients.scale is not None and not self.gradients.unscaled
        if scaled and not hasattr(self, "found_inf"):
            raise RuntimeError("the gradients are scaled: step with scaler.step(optimizer), not with optimizer.step()")
        if getattr(self, "grad_scale", None) is not None:  # the scaler has only looked at p.grad so far
            inverse = self.grad_scale.double().reciprocal().float()
            _foreach_mul_by_device([p.grad for p in self._params() if p.grad is not None], inverse)
        self._unscale_streams()
        if len(sets) == 1:
            return sets, [{p: p.grad for p in self._params() if p.grad is not None}]
        self.gradients.record({p: total for p, (total, _) in self.gradients.shown.items()})
        return sets, self.gradients.of_set or [{} for _ in sets]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; momenta come with the groups.

        Raises:
            ValueError: the state of another optimizer, or of other streams.
        """
        for group in state_dict["param_groups"]:
            missing = sorted(set(self.defaults) - set(group))
            if missing:
                raise ValueError(
                    f"not a state of {type(self).__name__}: its parameter groups have no {', '.join(missing)}"
                )
            self._check_momenta(group[MOMENTA])
        super().load_state_dict(state_dict)
        self._buffer_sets = None


def _foreach_mul_by_device(tensors: list[Tensor], factor: Tensor) -> None:
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        by_device.setdefault(t.device, []).append(t)
    for device, on_device in by_device.items():
        torch._foreach_mul_(on_device, factor.to(device))


def closure_loss(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
