"""A frozen teacher made faster: folded norms, memory format, precision, torch.compile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import convert_conv2d_weight_memory_format

from kd_core.utils.compiling import compile_in_place
from kd_core.utils.errors import UserError
from kd_core.utils.folding import fold_batch_norms, folded_weights
from kd_det.modeling.backbone import TimmBackbone

DTYPES = ("student", "float32", "bfloat16", "float16")
# Layers whose products autocast takes in its own type; others of their subclasses do more with a weight than that.
PRODUCTS = (nn.Conv2d.forward, Conv2d.forward, nn.Linear.forward)


@dataclass(frozen=True)
class TeacherSpeed:
    """How a teacher's backbone and box head compute; its RPN and other heads, which seldom run, are left alone.

    Args:
        fold_bn: batch norms become part of the convolutions before them: the same function, rounded otherwise.
        channels_last: their weights, and so what they compute, lie in memory with the channels last.
        dtype: of their products, by an autocast of their own; None: the student's. ROI pooling and the classifier are
            in float32 then, whatever the student's.
        compile: torch.compile them.
    """

    fold_bn: bool = False
    channels_last: bool = False
    dtype: torch.dtype | None = None
    compile: bool = False

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "TeacherSpeed":
        """What KD.TEACHER asks for; raises ValueError for a type that is none."""
        node = cfg.KD.TEACHER
        if node.DTYPE not in DTYPES:
            raise UserError(f"KD.TEACHER.DTYPE is {node.DTYPE!r}, expected {' or '.join(DTYPES)}")
        dtype = None if node.DTYPE == "student" else getattr(torch, node.DTYPE)
        return cls(node.FOLD_BN, node.CHANNELS_LAST, dtype, node.COMPILE)


def accelerate_teacher(model: GeneralizedRCNN, speed: TeacherSpeed) -> GeneralizedRCNN:
    """Change a frozen detector, in place, as `speed` says."""
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
        for predictor in each(model.roi_heads.box_predictor):
            if hasattr(predictor, "cls_score"):  # one's own predictor may have another
                predictor.cls_score.forward = AutocastForward(predictor.cls_score, torch.float32)
    return model


def distilled_parts(model: GeneralizedRCNN) -> dict[str, nn.Module]:
    """The backbone and the box head of every stage: what a distilled step runs of a detector over and over."""
    heads = model.roi_heads
    head = heads.res5 if isinstance(heads, Res5ROIHeads) else getattr(heads, "box_head", [])
    stages = each(head)
    names = ["box head"] if len(stages) == 1 else [f"box head of stage {k}" for k in range(len(stages))]
    return {"backbone": model.backbone, **dict(zip(names, stages, strict=True))}


def each(modules: nn.Module | Sequence[nn.Module]) -> Sequence[nn.Module]:
    """The modules of a list, or the one module as a list."""
    return list(modules) if isinstance(modules, nn.ModuleList | list) else [modules]


def fold_detector(model: GeneralizedRCNN) -> None:
    """Fold every batch norm of fixed statistics into its convolution: those of detectron2's layers and of timm's."""
    for module in model.modules():
        if isinstance(module, TimmBackbone):
            fold_batch_norms(module.extractor)
        elif type(module).forward is Conv2d.forward and has_fixed_statistics(module.norm):
            weight, bias = folded_weights(module.weight, module.bias, module.norm)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.bias = nn.Parameter(bias, requires_grad=False)
            module.norm = None


def has_fixed_statistics(norm: nn.Module | None) -> bool:
    """Whether a norm is one factor and one shift a channel, whatever its input."""
    running = isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
    return running or isinstance(norm, FrozenBatchNorm2d)


def cast_products(part: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of convolutions and linear layers once: autocast would cast frozen ones in every call."""
    for module in part.modules():
        if type(module).forward in PRODUCTS:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


class AutocastForward:
    """The forward pass of a module under an autocast of its own; what comes out is contiguous, and float32.

    An instance takes the place of `module.forward`: the module's name and weights stay, and whoever calls it (the RPN,
    an evaluation) gets what it always got.

    Args:
        module: of one input.
        dtype: of its products; None: whatever is ambient, and so is what comes out.
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
    """A module's output, or its named outputs, contiguous (ROI pooling would copy them) and of type `dtype`."""
    if isinstance(outputs, dict):
        return {name: to_contiguous(output, dtype) for name, output in outputs.items()}
    return outputs.to(dtype or outputs.dtype, memory_format=torch.contiguous_format)
