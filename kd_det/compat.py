"""What differs between detectron2 0.5, 0.6 and main, and between the versions of torch under them."""

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.evaluation import coco_evaluation
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from kd_core.utils.errors import UserError

try:  # main. 0.5: no such detector.
    from detectron2.modeling.meta_arch.fcos import FCOS, FCOSHead
except ImportError:
    FCOS = FCOSHead = None

# Every process keeps BatchNorm statistics of its own until `ShareBatchNorm`. Newer torch has renamed the option.
_DDP_OPTIONS = signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers": False}
NO_DEEPLAB = (
    "this detectron2 has no detectron2.projects.deeplab: install an upstream build, or remove detectron2 and run "
    "tools/install_detectron2.py"
)


def distribute(model: nn.Module) -> nn.Module:
    """DistributedDataParallel where there is more than one process, on CPU as on CUDA.

    0.5, 0.6, main: `create_ddp_model` names a device, which fails on the CPU.
    """
    if comm.get_world_size() == 1:
        return model
    devices = [torch.cuda.current_device()] if next(model.parameters()).is_cuda else None
    return DistributedDataParallel(model, device_ids=devices, **KEEP_BUFFERS)


def merged_parameter_groups(model: nn.Module, **options: Any) -> list[dict[str, Any]]:
    """detectron2's parameter groups, those of equal options merged: torch's foreach kernels want long lists.

    0.5: a group for each parameter. 0.6, main: merged already.
    """
    merged: dict[tuple[tuple[str, Any], ...], list[Tensor]] = {}
    for group in get_default_optimizer_params(model, **options):
        key = tuple(sorted((name, value) for name, value in group.items() if name != "params"))
        merged.setdefault(key, []).extend(group["params"])
    return [{"params": params, **dict(key)} for key, params in merged.items()]


def repeat_factors(loader: CfgNode, dicts: Iterable[dict]) -> Tensor:
    """How often `RepeatFactorTrainingSampler` shows each image in an epoch (DATALOADER.REPEAT_THRESHOLD).

    main: REPEAT_SQRT, whether factors are square roots. 0.5, 0.6: they always are.
    """
    options = {"sqrt": loader.REPEAT_SQRT} if "REPEAT_SQRT" in loader else {}
    return RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
        dicts, loader.REPEAT_THRESHOLD, **options
    )


def uses_sigmoid_loss(predictor: nn.Module) -> bool:
    """Whether a box predictor is trained by a binary cross-entropy for every class.

    main: USE_SIGMOID_CE. 0.5, 0.6: no such option.
    """
    return getattr(predictor, "use_sigmoid_ce", False)


def padding_options(backbone: nn.Module) -> dict[str, Any]:
    """What `ImageList.from_tensors` is told beside the divisor.

    main: `padding_constraints` of the backbone. 0.5, 0.6: nothing.
    """
    constraints = getattr(backbone, "padding_constraints", {})
    return {"padding_constraints": constraints} if constraints else {}


def square_size(backbone: nn.Module) -> int:
    """The side that a backbone pads every image to (ViTDet's `square_pad`); 0 where it takes any size.

    main: in `padding_constraints`. 0.5, 0.6: no such backbone.
    """
    return getattr(backbone, "padding_constraints", {}).get("square_size", 0)


def add_deeplab_config(cfg: CfgNode) -> None:
    """The keys of detectron2's DeepLab project, and its heads, where it is installed.

    0.5, 0.6, main: `detectron2.projects.deeplab` is part of upstream's builds; a copy of the package folder alone lacks
    it.
    """
    try:
        from detectron2.projects import deeplab
    except ImportError:
        return
    deeplab.add_deeplab_config(cfg)


def deeplab_scheduler() -> Callable[..., LRScheduler]:
    """DeepLab's `build_lr_scheduler`, which knows WarmupPolyLR.

    Raises:
        UserError: this detectron2 has no DeepLab.
    """
    try:
        from detectron2.projects.deeplab import build_lr_scheduler
    except ImportError as error:
        raise UserError(f"SOLVER.LR_SCHEDULER_NAME WarmupPolyLR: {NO_DEEPLAB}") from error
    return build_lr_scheduler


def tracing_adapter() -> type:
    """`detectron2.export.TracingAdapter`.

    0.5, 0.6: importing it needs caffe2, which torch no longer has. main: caffe2 is optional.

    Raises:
        UserError: this detectron2 cannot import it.
    """
    try:
        from detectron2.export import TracingAdapter
    except ImportError as error:
        raise UserError(
            f"TorchScript and ONNX need detectron2.export.TracingAdapter, and detectron2 {detectron2.__version__} "
            f"cannot import it ({error}); tools/install_detectron2.py installs one that can"
        ) from error
    return TracingAdapter


@contextmanager
def evaluating_with(cls: type) -> Iterator[None]:
    """Let detectron2's COCO evaluator use `cls` as COCOeval.

    0.5, 0.6, main: the evaluator takes no class as an argument, and its fast one is compiled code, which a Python-only
    build lacks.
    """
    own, coco_evaluation.COCOeval = coco_evaluation.COCOeval, cls
    try:
        yield
    finally:
        coco_evaluation.COCOeval = own


# What a model-zoo pickle is made of: dicts, strings and numpy arrays. numpy < 2 has numpy.core, numpy 2 numpy._core.
SAFE_GLOBALS = {
    ("collections", "OrderedDict"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
}


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers and refuses every other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which weights do not need")
        return super().find_class(module, name)


def numpy_allowed() -> Any:
    """Let `torch.load(…, weights_only=True)` build plain numpy arrays, as detectron2's own files hold them."""
    rebuild = np.zeros(0).__reduce__()[0]
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    kinds = {type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int64)}
    return torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *kinds])
