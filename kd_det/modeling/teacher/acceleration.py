"""Acceleration of a frozen teacher: folded norms, memory format, precision, torch.compile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import convert_conv2d_weight_memory_format

from kd_core.utils.compiling import compile_in_place
from kd_core.utils.errors import UserError
from kd_core.utils.folding import fold_batch_norms, folded_weights
from kd_det.modeling.backbone import TimmBackbone

DTYPES = ("student", "float32", "bfloat16", "float16")
# Layers whose weights autocast casts, so that casting them once is equivalent. Subclasses may use a weight otherwise.
PRODUCTS = (nn.Conv2d.forward, Conv2d.forward, nn.Linear.forward)


@dataclass(frozen=True)
class TeacherSpeed:
    """How a teacher's backbone and box head compute; of its RPN and other heads only the batch norms are folded.

    Args:
        fold_bn: fold batch norms into the convolutions before them, in all of the model: the same function up to
            rounding.
        channels_last: channels-last memory format of their weights, and so of their activations.
        dtype: their own autocast dtype; None: the student's. With a dtype, ROI pooling and the classifier are in
            float32.
        compile: torch.compile them.
    """

    fold_bn: bool = False
    channels_last: bool = False
    dtype: torch.dtype | None = None
    compile: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherSpeed":
        """The options of KD.TEACHER; raises a UserError for an unknown DTYPE."""
        node = cfg.KD.TEACHER
        if node.DTYPE not in DTYPES:
            raise UserError(f"KD.TEACHER.DTYPE is {node.DTYPE!r}, expected {' or '.join(DTYPES)}")
        dtype = None if node.DTYPE == "student" else getattr(torch, node.DTYPE)
        return cls(node.FOLD_BN, node.CHANNELS_LAST, dtype, node.COMPILE)


def accelerate_teacher(model: nn.Module, speed: TeacherSpeed) -> nn.Module:
    """Change a frozen model, in place, as `speed` says."""
    if speed.fold_bn:
        fold_detector(model)
    for name, part in distilled_parts(model).items():
        if speed.channels_last:
            convert_conv2d_weight_memory_format(part, torch.channels_last)  # `.to` refuses other convolutions' weights
        if speed.dtype not in (None, torch.float32):
            cast_products(part, speed.dtype)
        if speed.channels_last or speed.dtype is not None:
            part.forward = AutocastForward(part, speed.dtype)
        if speed.compile:
            compile_in_place(part, f"teacher's {name}")
    if speed.dtype is not None:
        heads = each(model.roi_heads.box_predictor) if hasattr(model, "roi_heads") else [getattr(model, "head", None)]
        for head in heads:
            if hasattr(head, "cls_score"):  # a custom predictor may name it otherwise
                head.cls_score.forward = AutocastForward(head.cls_score, torch.float32)
    return model


def distilled_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The backbone and the box head of every stage: the parts of a detector that every distilled step runs.

    Of a one-stage detector it is the backbone and the class branch of its head, of other models the backbone alone.
    """
    if hasattr(getattr(model, "head", None), "cls_subnet"):
        return {"backbone": model.backbone, "class branch": model.head.cls_subnet}
    heads = getattr(model, "roi_heads", None)
    head = heads.res5 if isinstance(heads, Res5ROIHeads) else getattr(heads, "box_head", [])
    stages = each(head)
    names = ["box head"] if len(stages) == 1 else [f"box head of stage {k}" for k in range(len(stages))]
    return {"backbone": model.backbone, **dict(zip(names, stages, strict=True))}


def each(modules: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The modules of a list, or the one module as a list."""
    return list(modules) if isinstance(modules, nn.ModuleList | list) else [modules]


def fold_detector(model: nn.Module) -> None:
    """Fold every batch norm with fixed statistics into its convolution, in detectron2's layers and timm's."""
    for module in model.modules():
        if isinstance(module, TimmBackbone):
            fold_batch_norms(module.extractor)
        elif type(module).forward is Conv2d.forward and has_fixed_statistics(module.norm):
            weight, bias = folded_weights(module.weight, module.bias, module.norm)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.bias = nn.Parameter(bias, requires_grad=False)
            module.norm = None


def has_fixed_statistics(norm: nn.Module | None) -> bool:
    """Whether a norm is one factor and one shift per channel, independent of its input."""
    running = isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
    return running or isinstance(norm, FrozenBatchNorm2d)


def cast_products(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers once; autocast would cast frozen ones in every call."""
    for module in part.modules():
        if type(module).forward in PRODUCTS:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


class AutocastForward:
    """A module's forward pass in its own autocast dtype, with contiguous float32 outputs.

    An instance replaces `module.forward`: the module keeps its name and weights, and its other callers (the RPN, an
    evaluation) get outputs of the usual type.

    Args:
        module: takes one input.
        dtype: for autocast; None: leave autocast and the outputs' dtype as they are.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None) -> None:
        self.module, self.dtype = module, dtype

    def __call__(self, inputs: Tensor) -> Any:
        plain = type(self.module).forward
        if self.dtype is None:
            return to_contiguous(plain(self.module, inputs))
        with torch.autocast(inputs.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return to_contiguous(plain(self.module, inputs.float()), torch.float32)


def to_contiguous(outputs: Tensor | dict[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """A module's output or outputs, contiguous (ROI pooling would copy them otherwise), in `dtype`."""
    if isinstance(outputs, dict):
        return {name: to_contiguous(output, dtype) for name, output in outputs.items()}
    return outputs.to(dtype or outputs.dtype, memory_format=torch.contiguous_format)
