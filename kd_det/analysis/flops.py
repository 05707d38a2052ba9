"""Parameters and multiply-adds of the models that trainings have left."""

import json
import logging
from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kd_core.utils.errors import UserError
from kd_core.utils.latency import multiply_adds
from kd_core.utils.report.runs import Run
from kd_det.export import read_config

logger = logging.getLogger(__name__)


def measure_cost(runs: Sequence[Run]) -> None:
    """Put `parameters` and `gflops` of each run's student.yaml into its `info`; equal models are measured once.

    A LazyConfig's student.yaml is code and is not run.
    """
    known: dict[str, tuple[int, float]] = {}
    for run in runs:
        path = run.folder / "student.yaml"
        if "dataloader" in run.config or not path.is_file():
            continue
        try:
            cfg = read_config(str(path))
            cfg.MODEL.WEIGHTS = ""
            if "TIMM" in cfg.MODEL:  # no weights are needed
                cfg.MODEL.TIMM.PRETRAINED, cfg.MODEL.TIMM.WEIGHTS = False, ""
            model_key = json.dumps([cfg.MODEL, cfg.INPUT], sort_keys=True, default=str)
            if model_key not in known:
                model = build_model(cfg).eval()
                known[model_key] = sum(p.numel() for p in model.parameters()), of_test_image(model, cfg) / 1e9
            run.info["parameters"], run.info["gflops"] = known[model_key]
        except (UserError, OSError, KeyError, RuntimeError, AssertionError) as error:
            logger.warning("%s: the model's cost is not known: %s", path, error)


@torch.no_grad()
def of_test_image(model: nn.Module, cfg: CfgNode) -> int:
    """Multiply-adds of one image of the test size, 4:3 as far as MAX_SIZE_TEST allows.

    The weights are random, so NMS leaves another number of proposals than a trained model's: the box head's share
    may differ by a few per cent.
    """
    height = cfg.INPUT.MIN_SIZE_TEST
    width = min(height * 4 // 3, cfg.INPUT.MAX_SIZE_TEST)
    image = torch.zeros(3, height, width).random_(256, generator=torch.Generator().manual_seed(0))
    return multiply_adds(model, [{"image": image, "height": height, "width": width}])
