"""Exports a student from a training's folder: plain detectron2 weights, TorchScript, ONNX."""

import io
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, SemanticSegmentor, build_model
from torch import Tensor, nn

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_whole
from kd_core.utils.state_dict import check_fit
from kd_det.checkpoint.checkpointer import WholeCheckpointer
from kd_det.compat import tracing_adapter
from kd_det.config import kd_defaults, merge_file
from kd_det.config.student import student_config, write_student
from kd_det.modeling.teacher.view import preprocess_image

logger = logging.getLogger(__name__)

CONFIGS = ("student.yaml", "config.yaml")  # written beside the checkpoints of a training
TRACED_AT, CHECKED_AT = (3, 320, 256), (3, 224, 352)  # an image's (C, H, W): a trace must hold at other sizes too
TOLERANCE = 1e-3  # in pixels and scores: another order of additions rounds otherwise
OPSET = 17
ONNX_SHARE = 0.9  # of detections: other kernels round otherwise, and two of nearly equal scores may swap


@dataclass(frozen=True)
class Student:
    """A model in eval mode on the CPU, the plain detectron2 config that builds it, and its weights file."""

    model: nn.Module
    config: CfgNode
    source: Path


def read_student(source: str | os.PathLike, config_file: str | None = None, average: bool = False) -> Student:
    """Load the student in `source`, every weight of it.

    Args:
        source: an OUTPUT_DIR (its last checkpoint), or a checkpoint.
        config_file: of the training, or plain detectron2's; by default the one beside the checkpoint.
        average: load the moving average of the weights (SOLVER.EMA) from the checkpoint.
    Raises:
        UserError: no such file; a weight missing, left over or of another shape.
    """
    weights = find_weights(Path(source).expanduser())
    config = read_config(config_file or find_config(weights))
    model = build_model(config).eval()
    checkpoint = WholeCheckpointer(model, save_to_disk=False)._load_file(str(weights))
    if average and "ema" not in checkpoint:
        raise UserError(
            f"{weights} holds no moving average: it was trained without SOLVER.EMA.ENABLED, or is the average itself"
        )
    state = checkpoint["ema" if average else "model"]
    check_fit(state, model.state_dict(), str(weights))
    model.load_state_dict(state)
    return Student(model, config, weights)


def find_weights(source: Path) -> Path:
    """The checkpoint that `source` is, or the one in it."""
    if source.is_file():
        return source
    last = source / "last_checkpoint"
    # The last checkpoint first: model_final.pth may be left from an earlier run in this folder.
    names = [*([last.read_text(encoding="utf-8").strip()] if last.is_file() else []), "model_final.pth"]
    for name in names:
        if (source / name).is_file():
            return source / name
    what = f"holds none of {', '.join(names)}" if source.is_dir() else "is neither a file nor a folder"
    raise UserError(f"{source} {what}: give a training's OUTPUT_DIR, or a checkpoint")


def find_config(weights: Path) -> str:
    """The config beside a checkpoint."""
    for name in CONFIGS:
        if weights.with_name(name).is_file():
            return str(weights.with_name(name))
    raise UserError(f"there is no {' or '.join(CONFIGS)} beside {weights}: give --config-file")


def read_config(path: str) -> CfgNode:
    """Plain detectron2's config of the student that `path` describes, ours or plain."""
    if not os.path.isfile(path):
        raise UserError(f"--config-file: there is no file {path}")
    cfg = kd_defaults()
    merge_file(cfg, path)
    plain = student_config(cfg)
    plain.MODEL.DEVICE = "cpu"
    return plain


def save_plain(student: Student, folder: Path) -> list[Path]:
    """Write `student.pth` and `student.yaml`, which plain detectron2 loads."""
    weights, config = folder / "student.pth", folder / "student.yaml"
    content = {"model": student.model.state_dict(), "__author__": "decoupled-kd"}
    write_whole(weights, lambda file: torch.save(content, file))
    plain = student.config.clone()
    plain.MODEL.WEIGHTS = str(weights.resolve())
    write_student(plain, config)
    return [weights, config]


def adapter(student: Student) -> nn.Module:
    """The detector as a function of one image (3, H, W) that returns tensors, for tracing.

    Raises:
        UserError: this detectron2 has no `TracingAdapter`, and why; a panoptic model, whose outputs are no list.
    """
    if isinstance(student.model, PanopticFPN):
        raise UserError("TorchScript and ONNX are not implemented for PanopticFPN: export without them")
    function = segment if isinstance(student.model, SemanticSegmentor) else detect
    return tracing_adapter()(student.model, [{"image": example(TRACED_AT)}], function).eval()


def detect(model: nn.Module, inputs: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Detections in pixels of the image given; masks as the head gives them, 28 × 28."""
    if not isinstance(model, GeneralizedRCNN):  # a one-stage detector has no masks
        return model(inputs)
    return [{"instances": model.inference(inputs, do_postprocess=False)[0]}]


def segment(model: SemanticSegmentor, inputs: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Logits (C, H, W) at the size of the image given."""
    _, height, width = inputs[0]["image"].shape
    logits, _ = model.sem_seg_head(model.backbone(preprocess_image(model, inputs).tensor), None)
    return [{"sem_seg": logits[0, :, :height, :width]}]


def example(shape: tuple[int, int, int]) -> Tensor:
    """An image of noise."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def output_names(traceable: nn.Module) -> list[str]:
    """The fields of the detections, in the order of the traced outputs; the image's size comes last.

    A segmentation has one output, its logits.
    """
    traceable(example(TRACED_AT))
    if isinstance(traceable.model, SemanticSegmentor):
        return ["sem_seg"]
    return [*traceable.outputs_schema.schemas[0].schemas[0].keys, "image_size"]


@torch.no_grad()
def save_torchscript(student: Student, path: Path) -> list[str]:
    """Trace the student, check the trace against it at another size of image, and write it.

    Returns:
        The names of the outputs, in order.
    Raises:
        UserError: detectron2 cannot trace it; RuntimeError: the trace gives other detections.
    """
    traceable = adapter(student)
    names = output_names(traceable)
    traced = torch.jit.trace(traceable, (example(TRACED_AT),), check_trace=False)
    check_equal("the trace", traceable, traced)
    write_whole(path, lambda file: torch.jit.save(traced, file))
    return names


@torch.no_grad()
def save_onnx(student: Student, path: Path) -> list[str]:
    """Write the student as ONNX; checked as in `save_torchscript` where onnxruntime is installed.

    Raises:
        UserError: this torch and detectron2 cannot export it, and why.
    """
    traceable = adapter(student)
    names = output_names(traceable)
    if find_spec("onnx") is None:
        raise UserError(f"ONNX: torch {torch.__version__} writes it by means of the package onnx: pip install onnx")
    buffer = io.BytesIO()
    options = {"input_names": ["image"], "output_names": names, "dynamic_axes": {"image": {1: "height", 2: "width"}}}
    try:
        torch.onnx.export(traceable, (example(TRACED_AT),), buffer, opset_version=OPSET, dynamo=False, **options)
    except Exception as error:  # an operator without a counterpart, a missing package: many kinds of exception
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"ONNX: torch {torch.__version__} and detectron2 {detectron2.__version__} cannot export this detector "
            f"({type(error).__name__}: {reason})"
        ) from error
    if find_spec("onnxruntime") is not None:
        check_equal("the ONNX model", traceable.eval(), run_onnx(buffer.getvalue()), ONNX_SHARE)
    write_whole(path, lambda file: file.write(buffer.getvalue()))
    return names


def run_onnx(content: bytes) -> Callable[[Tensor], list[Tensor]]:
    """An ONNX model as a function of an image."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda image: [torch.as_tensor(output) for output in session.run(None, {"image": image.numpy()})]


def check_equal(what: str, traceable: nn.Module, exported: Callable[[Tensor], Any], share: float = 1.0) -> None:
    """Raise RuntimeError unless `exported` detects in an image of another size what the student does.

    Args:
        share: of the detections that must be equal, at the same place in the list.
    """
    expected, found = (list(as_tuple(function(example(CHECKED_AT)))) for function in (traceable, exported))
    alike = all(a.shape == b.shape for a, b in zip(expected, found, strict=True))
    if len(expected) > 1:  # detections end with the image's size
        alike = alike and expected.pop().equal(found.pop())
    if alike and len(expected[0]):
        differences = [(a.double() - b.double()).abs().flatten(1).amax(1) for a, b in columns(expected, found)]
        alike = torch.stack(differences).amax(0).le(TOLERANCE).double().mean() >= share
    if alike and len(expected[0]) == 0:
        logger.warning("%s: the student detects nothing in the image of noise that it is compared on", what)
    if not alike:
        raise RuntimeError(f"{what} gives other detections than the student: it is not written")


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a traced function, which a single one comes without a tuple of."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def columns(expected: list[Tensor], found: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The fields of two lists of N detections, (N, anything)."""
    return [(a.reshape(len(a), -1), b.reshape(len(b), -1)) for a, b in zip(expected, found, strict=True)]
