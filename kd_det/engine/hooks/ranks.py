"""BatchNorm statistics of several processes: each has seen its own images only."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from timm.utils import distribute_bn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class ShareBatchNorm(HookBase):
    """Before a checkpoint and before an evaluation, gives every process the mean of all processes' statistics.

    Gradients need none of it (training normalises by the batch), but the checkpoint would hold rank 0's statistics
    alone, and a resumed training would differ from an undisturbed one. To be registered in every process, before the
    hooks that save and evaluate.

    Args:
        models: those whose statistics to share: the student, and its moving average.
        periods: iterations between checkpoints and between evaluations; 0 for none. The last iteration always shares.
    """

    def __init__(self, models: list[nn.Module], periods: tuple[int, ...]) -> None:
        self.models, self.periods = models, [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or any(done % period == 0 for period in self.periods):
            for model in self.models:
                share_batch_norm(model)


def share_batch_norm(model: nn.Module) -> None:
    """Average running means and variances over the processes.

    FrozenBatchNorm2d is left alone: its statistics are weights, equal everywhere, and an average might round them.
    """
    if comm.get_world_size() == 1:
        return
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            distribute_bn(module, comm.get_world_size(), reduce=True)


def check_synchronised_norms(cfg: CfgNode, world_size: int) -> None:
    """Refuse SyncBN on CPU processes, which torch's cannot serve.

    Raises:
        ValueError: names the key and what to use instead.
    """
    if world_size == 1 or cfg.MODEL.DEVICE != "cpu":
        return
    for key, norm in norms(cfg.MODEL, "MODEL"):
        if norm in ("SyncBN", "nnSyncBN"):
            raise ValueError(
                f"{key} {norm} synchronises GPUs only, and this training runs in {world_size} processes on the CPU: "
                f"set {key} naiveSyncBN, or BN"
            )


def norms(node: CfgNode, name: str) -> list[tuple[str, str]]:
    """Every (key, value) called NORM below `node`."""
    found = []
    for key, value in node.items():
        if isinstance(value, CfgNode):
            found += norms(value, f"{name}.{key}")
        elif key == "NORM":
            found.append((f"{name}.{key}", value))
    return found
