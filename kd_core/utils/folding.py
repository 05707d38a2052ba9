"""Batch norms of a frozen network folded into the convolutions before them: the same function in fewer passes."""

import contextlib
import copy
import gc
import inspect
import logging
import math
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

from kd_core.utils.errors import one_line

logger = logging.getLogger(__name__)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
MAX_QUESTIONS = 4  # 2⁴ ways through a forward at most
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def folded_weights(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that is `norm(conv(x))`, for a batch norm of fixed statistics.

        s = γ / sqrt(running_var + eps),  weight' = s · weight,  bias' = β + s · (bias − running_mean)

    Computed in float64 on the CPU (not every device has it), and rounded once.

    Args:
        weight: (C, …), of the convolution.
        bias: (C,), or None for none.
        norm: anything with `running_mean`, `running_var`, `weight` (γ), `bias` (β; None: 1 and 0) and `eps`: torch's
            and timm's batch norms, torchvision's and detectron2's FrozenBatchNorm2d.
    Returns:
        weight' and bias', of the weight's dtype, device and memory format, without gradients.
    """

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to("cpu", torch.float64)

    statistics = wide(norm.running_mean), wide(norm.running_var), norm.eps
    folded = fuse_conv_bn_weights(wide(weight), wide(bias), *statistics, wide(norm.weight), wide(norm.bias))
    return folded[0].detach().to(weight), folded[1].detach().to(weight)


@torch.no_grad()
def fold_batch_norms(
    model: nn.Module,
    convolutions: Sequence[type[nn.Module]] = CONVOLUTIONS,
    leaves: Sequence[type[nn.Module]] = (),
) -> int:
    """Fold, in place, each batch norm into the convolution whose output goes there and nowhere else.

    Left alone: norms in train mode or without running statistics, whatever has parameters that train, hooks,
    parametrizations (spectral and weight norm are such) or a second use, and classes whose arithmetic is unknown. A
    second use is also that the forward stores what comes before the norm (`self.feature = conv(x)`). The norm gives way
    to its dropout and activation, where it has them as timm's BatchNormAct2d does, else to nn.Identity.

    Args:
        model: in eval mode and frozen. One that torch.fx cannot trace stays as it is, with a message in the log.
        convolutions: the exact classes that may be folded into: a subclass may do anything to its weights. Each must
            compute a torch convolution of `weight` plus `bias`, which may be None.
        leaves: classes that tracing must not look into.
    Returns:
        The number of norms folded.
    """
    try:
        # A forward may keep what it computes: tracing runs that of a copy, which has the same tensors.
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        pairs = _pairs(model, _graphs(copy.deepcopy(model, tensors), leaves), convolutions)
    except Exception as error:  # tracing runs the network's own code, which may raise anything
        logger.info("%s cannot be traced (%s): its batch norms stay as they are", type(model).__name__, one_line(error))
        return 0
    for conv_name, norm_name in pairs:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        weight, bias = folded_weights(conv.weight, conv.bias, norm)
        conv.weight, conv.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
        parent, _, name = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), name, _after_norm(norm))
    return len(pairs)


class _Tracer(fx.Tracer):
    """Records which module is called on what; convolutions and norms are never looked into, whosever they are.

    Where the forward asks a question about its input (`if x.shape[2] == 64`), the answers are `planned`, then False.
    """

    proxy_buffer_attributes = True  # a forward that reads a norm's buffer itself shows in the graph

    def __init__(self, leaves: Sequence[type[nn.Module]], planned: tuple[bool, ...] = ()) -> None:
        super().__init__()
        self.leaves, self.planned, self.answers = (_ConvNd, *leaves), planned, ()
        self.proxies: list[weakref.ref[fx.Proxy]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        self.proxies.append(weakref.ref(made))
        return made

    def stored(self) -> set[fx.Node]:
        """What the forward has stored outside of itself (`self.feature = conv(x)`): all that has outlived it."""
        if any(reference() is not None for reference in self.proxies):
            gc.collect()  # one that nothing reaches is not stored
        return {proxy.node for reference in self.proxies if (proxy := reference()) is not None}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return super().is_leaf_module(module, name) or isinstance(module, self.leaves) or _is_norm(module)

    def to_bool(self, question: fx.Proxy) -> bool:
        asked = len(self.answers)
        if asked == MAX_QUESTIONS:
            raise RuntimeError(f"its forward asks more than {MAX_QUESTIONS} questions about its input")
        self.answers += (self.planned[asked] if asked < len(self.planned) else False,)
        return self.answers[-1]


def _graphs(model: nn.Module, leaves: Sequence[type[nn.Module]]) -> list[tuple[fx.Graph, set[fx.Node]]]:
    """The graph of every way that the forward can take, whatever its input, and what it stores on that way.

    Ways into an AssertionError are none.
    """
    graphs, plans = [], [()]
    while plans:
        plan = plans.pop()
        tracer = _Tracer(leaves, plan)
        with contextlib.suppress(AssertionError):
            graph = tracer.trace(model, _defaults(model))
            graphs.append((graph, tracer.stored()))
        plans += [(*tracer.answers[:i], True) for i in range(len(plan), len(tracer.answers))]
    return graphs


def _defaults(model: nn.Module) -> dict[str, object]:
    """Optional arguments of the forward at their defaults: traced as unknowns, `if mask is None` would be False."""
    parameters = inspect.signature(model.forward).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if parameter.default is not parameter.empty}


def _pairs(
    model: nn.Module, graphs: Sequence[tuple[fx.Graph, set[fx.Node]]], convolutions: Sequence[type[nn.Module]]
) -> set[tuple[str, str]]:
    """Names of the convolutions and norms that can be folded, whichever way the forward takes."""
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    chains = [_chains(graph, stored) for graph, stored in graphs]
    pairs = set()
    for conv_name, norm_name in set.intersection(*chains) if chains else ():
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        if (
            type(conv) in convolutions
            and names[id(conv)] == names[id(norm)] == 1
            and all(_is_plain(model.get_submodule(name)) for name in _path(conv_name) ^ _path(norm_name))
            and _is_frozen(conv, norm)
            and _is_affine(norm, conv)
        ):
            pairs.add((conv_name, norm_name))
    return pairs


def _chains(graph: fx.Graph, stored: set[fx.Node]) -> set[tuple[str, str]]:
    """Names of every two modules of which the first's output goes to the second alone, both used only so."""
    targets = Counter(node.target for node in graph.nodes if node.op in ("call_module", "get_attr"))
    chains = set()
    for node in graph.nodes:
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        if node.op == "call_module" and isinstance(source, fx.Node) and source.op == "call_module":
            pair = (source.target, node.target)
            if (
                list(source.users) == [node]
                and source not in stored
                and all(_used_once(name, targets) for name in pair)
            ):
                chains.add(pair)
    return chains


def _used_once(name: str, targets: Counter[str]) -> bool:
    """Whether a module is called once and nothing in it is read or called from outside."""
    return sum(count for target, count in targets.items() if f"{target}.".startswith(f"{name}.")) == 1


def _path(name: str) -> set[str]:
    """The names of a module and of those around it: "a.b.c" → {"a", "a.b", "a.b.c"}."""
    parts = name.split(".")
    return {".".join(parts[:length]) for length in range(1, len(parts) + 1)}


def _is_plain(module: nn.Module) -> bool:
    """Whether calling a module is its class's forward on its own parameters, with no hooks on it."""
    is_watched = any(getattr(module, hooks) for hooks in HOOKS)
    return not is_watched and not nn.utils.parametrize.is_parametrized(module) and "forward" not in vars(module)


def _is_frozen(conv: nn.Module, norm: nn.Module) -> bool:
    """Whether neither trains: no gradients, and the norm (with what it holds) in eval mode."""
    parameters = (*conv.parameters(), *norm.parameters())
    return not any(p.requires_grad for p in parameters) and not any(part.training for part in norm.modules())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module looks like a batch norm: FrozenBatchNorm2d, of which there are several, is none of torch's."""
    tensors = module._parameters.keys() | module._buffers.keys()  # hasattr would show in the graph that is being traced
    return tensors >= {"running_mean", "running_var", "weight", "bias"} and "eps" in vars(module)


def _after_norm(norm: nn.Module) -> nn.Module:
    """What a norm does behind its affine map, under its own names: timm's have a dropout and an activation."""
    named = {name: getattr(norm, name, None) for name in ("drop", "act")}
    steps = {n: s for n, s in named.items() if isinstance(s, nn.Module) and not isinstance(s, nn.Identity)}
    return nn.Sequential(OrderedDict(steps)) if steps else nn.Identity()


def _is_affine(norm: nn.Module, conv: nn.Module) -> bool:
    """Whether `norm(x)` is the affine map of its running statistics, with `_after_norm` behind it.

    Torch's own classes are known; any other is tried on a few numbers, since a subclass may do anything.
    """
    channels = conv.weight.shape[0]
    if not _is_norm(norm) or norm.running_mean is None or norm.running_mean.shape != (channels,):
        return False
    if type(norm) in NORMS:
        return True
    norm = copy.deepcopy(norm).to("cpu", torch.float64)
    sides = [3] * (conv.weight.dim() - 2)  # with neighbours: a norm that pools is no map of each value by itself
    count = 4 * channels * math.prod(sides)
    x = torch.linspace(-2, 3, count, dtype=torch.float64) ** 3  # of both signs, with no mean of 0 to hide behind
    x = x.view(4, channels, *sides)
    affine = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    return torch.allclose(norm(x), _after_norm(norm)(affine), rtol=1e-9, atol=1e-9)
