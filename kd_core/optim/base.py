"""What StreamSGD and StreamAdamW share: momenta by stream in every group, checked gradients, clipping, state."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from kd_core.distributed import is_sharded, local
from kd_core.streams import stream_sets
from kd_core.streams.gradients import StreamGradients, StreamSets, foreach_multiply_

MOMENTA = "momenta"
BUFFERS = "momentum_buffers"


def label(streams: Iterable[str]) -> str:
    """The name of a set in `state_dict()`: its streams, joined."""
    return "+".join(streams)


class StreamOptimizer(torch.optim.Optimizer):
    """An optimizer whose gradient arrives in streams, each with its momentum (`kd_core.streams.backward_streams`).

    Every parameter group has `momenta` {stream: momentum in [0, 1)}, of the same streams in all groups. Streams of
    equal momentum form a *set*, with one buffer per parameter: `state[p]["momentum_buffers"][label]`. The sets follow
    from the groups' momenta and are stored nowhere.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        self.gradients = StreamGradients()
        self._buffer_sets: StreamSets | None = None  # the sets that all buffers are known to follow
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For unpickling, deep copies and, by `torch.optim.Optimizer`, `load_state_dict`."""
        own_keys = set(state.get("defaults") or self.defaults)
        super().__setstate__(state)
        # torch has added keys of its own there, which no saved group needs to have.
        self.defaults = {key: value for key, value in self.defaults.items() if key in own_keys}
        self.__dict__.setdefault("gradients", StreamGradients())
        self._buffer_sets = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Tells GradScaler that `step` itself reads `found_inf`, so that the host need not."""
        return True

    @property
    def stream_sets(self) -> StreamSets:
        """The streams that share a backward pass and a buffer."""
        return stream_sets([group[MOMENTA] for group in self.param_groups])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; raises ValueError for a value out of its range."""
        merged = {**self.defaults, **param_group}
        self._check_group(merged)
        super().add_param_group({**param_group, MOMENTA: dict(merged[MOMENTA])})

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for key in ("lr", "weight_decay"):
            if not group[key] >= 0:
                raise ValueError(f"{key} is {group[key]}: it must be ≥ 0")
        self._check_momenta(group[MOMENTA])

    def _check_momenta(self, momenta: Mapping[str, float]) -> None:
        streams = self.defaults[MOMENTA]
        if not momenta:
            raise ValueError("momenta is empty: give {stream: momentum}, as {'tog': .975, 'tcg': .825, 'ncg': .975}")
        for stream, momentum in momenta.items():
            if "+" in stream:
                raise ValueError(f"the stream name {stream!r} has a '+', which joins the names of a set: rename it")
            if stream not in streams:
                raise ValueError(f"unknown stream {stream!r} in momenta: the streams are {', '.join(streams)}")
            if not 0 <= momentum < 1:
                raise ValueError(f"the momentum of stream {stream!r} is {momentum}: it must be in [0, 1)")
        for stream in streams:
            if stream not in momenta:
                raise ValueError(f"stream {stream!r} is missing from momenta {dict(momenta)}: name every stream")

    def set_momenta(self, momenta: Mapping[str, float]) -> None:
        """Sets the momenta of every group, between a step and the next backward pass.

        Where that splits a set, the whole buffer stays with the decay stream's part (else with the first stream's:
        ours), and the other part starts at 0; where sets merge, their buffers add.

        Raises:
            ValueError: a stream missing or unknown, a momentum outside [0, 1).
        """
        self._check_momenta(momenta)
        for group in self.param_groups:
            group[MOMENTA] = {stream: momenta[stream] for stream in group[MOMENTA]}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the gradients of every stream; `set_to_none=False` makes them 0: momentum and decay still act then."""
        sets = self.stream_sets
        if not set_to_none and len(sets) > 1 and sets == self.gradients.sets:
            self.gradients.zero_(self._params())
        else:
            self.gradients.clear()
            super().zero_grad(set_to_none or len(sets) > 1)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False) -> Tensor:
        """Scales every stream by one factor, so that the norm of their sum is at most `max_norm`.

        Under a GradScaler the gradients are unscaled first, whether or not `scaler.unscale_(optimizer)` was called.

        Returns:
            The norm before; the host does not wait for it.
        """
        sets = self._unscaled_sets()
        shown = [p.grad for p in self._params() if p.grad is not None]
        norm = total_norm(shown, norm_type, error_if_nonfinite)
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if factor.device.type == "cpu" and factor == 1:
            return norm  # nothing to do, and on the CPU it costs nothing to know
        if len(sets) > 1:
            self.gradients.multiply_(factor)
        else:
            foreach_multiply_(map(local, shown), factor)
        return norm

    @torch.no_grad()
    def clip_each_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> None:
        """Clips every parameter by itself, as detectron2's `CLIP_TYPE norm` does.

        All streams of a parameter are scaled by one factor, so that the norm of their sum is at most `max_norm`: with
        equal momenta it is what the sum alone would be clipped to. The host does not wait for the norms. Under a
        GradScaler as in `clip_grad_norm_`.
        """
        sets = self._unscaled_sets()
        reached = [p for p in self._params() if p.grad is not None and p.numel()]
        if not reached:
            return
        reached.sort(key=is_sharded)  # one call takes one kind of tensors
        kinds = [[p.grad for p in reached if is_sharded(p) is kind] for kind in (False, True)]
        norms = [whole(norm) for kind in kinds if kind for norm in torch._foreach_norm(kind, norm_type)]
        factors = [torch.clamp(max_norm / (norm + 1e-6), max=1.0) for norm in norms]
        if len(sets) > 1:
            self.gradients.multiply_(dict(zip(reached, factors, strict=True)))
        else:
            torch._foreach_mul_([local(p.grad) for p in reached], factors)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    def _reached(self) -> dict[Tensor, Tensor]:
        """The parameters with a gradient, as torch's optimizers take them: also one that was frozen since."""
        return {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}

    def _unscaled_sets(self) -> StreamSets:
        """The sets, whose gradients are checked, and unscaled by way of the scaler, which notes infinities."""
        sets, inverse = self.stream_sets, None
        if self.gradients.scale is not None:
            try:
                self.gradients.scaler.unscale_(self)
            except RuntimeError as error:  # the user has called it, as is usual before clipping
                if "already been called" not in str(error):
                    raise
            inverse = _reciprocal(self.gradients.scale)
        if len(sets) > 1:
            self.gradients.check(self._params(), sets, unscaled_by=inverse)
        self.gradients.scale = None
        return sets

    def _gradients_for_step(self) -> list[tuple[tuple[str, ...], dict[Tensor, Tensor]]]:
        """Every set with its gradients, checked, unscaled, and the buffers regrouped to the sets."""
        sets, scale = self.stream_sets, self.gradients.scale
        if scale is not None and not hasattr(self, "found_inf"):
            raise RuntimeError("the gradients are scaled: step by scaler.step(optimizer), not by optimizer.step()")
        gradients = self.gradients
        if hasattr(self, "found_inf") and any(gradients.of_set) and not (gradients.was_scaled or gradients.is_zeroed):
            raise RuntimeError(
                "a GradScaler steps the optimizer, and would divide gradients that it has not multiplied: pass it as "
                "scaler= to backward_streams, which scales the losses itself (accelerate and the HF Trainer have it as "
                "accelerator.scaler, Lightning as trainer.precision_plugin.scaler)"
            )
        grad_scale = getattr(self, "grad_scale", None)  # None: the user has called scaler.unscale_
        if len(sets) > 1:
            by_scaler = _reciprocal(scale) if scale is not None and grad_scale is None else None
            self.gradients.check(self._params(), sets, unscaled_by=by_scaler)
        self._regroup_buffers(sets)
        if grad_scale is not None:  # the scaler has checked p.grad, but not divided it
            if len(sets) > 1:
                self.gradients.multiply_(_reciprocal(grad_scale))
            else:
                foreach_multiply_(list(self._reached().values()), _reciprocal(grad_scale))
        self.gradients.scale = None
        if len(sets) == 1:
            return [(sets[0], self._reached())]
        return list(zip(sets, self.gradients.of_set or [{} for _ in sets], strict=True))

    def _buffer(self, p: Tensor, name: str, create: bool = True) -> Tensor | None:
        """The buffer of a set, made at 0, and in the parameter's own memory format, when first asked for."""
        state = self.state[p]
        if BUFFERS not in state:
            state[BUFFERS] = {}
        buffers = state[BUFFERS]
        if create and name not in buffers:
            buffers[name] = torch.zeros_like(p)
        return buffers.get(name)

    def _regroup_buffers(self, sets: StreamSets) -> None:
        """Moves every buffer to the set that its heir is in now."""
        if sets == self._buffer_sets:
            return
        new_label = {stream: label(streams) for streams in sets for stream in streams}
        for group in self.param_groups:
            for p in group["params"]:
                old = self.state[p].get(BUFFERS, {}) if p in self.state else {}
                if not all(name in new_label.values() for name in old):
                    self.state[p][BUFFERS] = _moved(old, {n: new_label[self._heir(n, group)] for n in old})
        self._buffer_sets = sets

    def _heir(self, name: str, group: Mapping[str, Any]) -> str:
        """The stream that keeps the buffer of the set `name` when it is split."""
        streams = name.split("+")
        return group["decay_stream"] if group.get("decay_stream") in streams else streams[0]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`; the momenta, with all else of the groups, are the saved ones.

        Raises:
            ValueError: the state of another optimizer, or of other streams.
        """
        for group in state_dict["param_groups"]:
            missing = sorted(set(self.defaults) - set(group))
            if missing:
                raise ValueError(f"not a state of {type(self).__name__}: its groups have no {', '.join(missing)}")
            self._check_group(group)
        super().load_state_dict(state_dict)


def local_gradient(p: Tensor, gradient: Tensor) -> Tensor:
    """This rank's part of a gradient, in the parameter's type: `p.grad_dtype` may differ from it."""
    gradient = local(gradient)
    return gradient if gradient.dtype == p.dtype else gradient.to(p.dtype)


def total_norm(gradients: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """`torch.nn.utils.get_total_norm` of gradients of which some may be sharded."""
    parts = [[g for g in gradients if not is_sharded(g)], [g for g in gradients if is_sharded(g)]]
    norms = [whole(torch.nn.utils.get_total_norm(part, norm_type, error_if_nonfinite)) for part in parts if part]
    return norms[0] if len(norms) == 1 else torch.nn.utils.get_total_norm(norms, norm_type, error_if_nonfinite)


def whole(t: Tensor) -> Tensor:
    """A sharded tensor, gathered; any other tensor itself."""
    return t.full_tensor() if is_sharded(t) else t


def _reciprocal(scale: Tensor) -> Tensor:
    return scale.double().reciprocal().float()


def _moved(buffers: Mapping[str, Tensor], destination: Mapping[str, str]) -> dict[str, Tensor]:
    moved: dict[str, Tensor] = {}
    for name, buffer in buffers.items():
        to = destination[name]
        moved[to] = moved[to] + buffer if to in moved else buffer
    return moved


def run_closure(closure: Callable[[], Tensor] | None) -> Tensor | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
