"""One process of a gloo group, started from test_distributed.py.

torchrun … train_ranks.py CONFIG_FILE OUTPUT [KEY VALUE …]: trains, and saves what this rank ended with.
"""

import sys
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_cls.build import build_trainer
from kd_cls.config import load_cfg
from kd_cls.distributed import Process, start_process
from kd_cls.evaluate import evaluate_checkpoint


def main(config_file: str, output: str, options: list[str]) -> None:
    torch.set_num_threads(1)
    cfg = load_cfg(config_file, [*options, "OUTPUT_DIR", output])
    with start_process(cfg.DEVICE) as process:
        Path(output).mkdir(exist_ok=True)
        trainer = build_trainer(cfg, process)
        seen, update = [], trainer.meters.update

        def counted(result: dict, logits: torch.Tensor, target: torch.Tensor, iteration: int) -> None:
            seen.append(len(target))
            update(result, logits, target, iteration)

        trainer.meters.update = counted
        metrics = trainer.run()
        state = {"student": trainer.task.trainable_module.state_dict(), "metrics": metrics, "seen": seen}
        state["evaluated"] = evaluate_checkpoint(cfg, process)
        state["feature"] = train_feature(cfg, process)
        torch.save(state, Path(output, f"rank{process.rank}.pt"))


def train_feature(cfg: CfgNode, process: Process) -> dict[str, torch.Tensor]:
    """The parameters of a feature loss after a short training with one, BatchNorm seeing each rank's own images."""
    cfg = cfg.clone()
    cfg.KD.FEATURE.NAME, cfg.SOLVER.EPOCHS, cfg.MODEL.FREEZE_BN = "review", 1.0, False
    cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR, "feature"))
    trainer = build_trainer(cfg, process)
    first = {name: p.detach().clone() for name, p in trainer.task.feature.named_parameters()}
    trainer.run()
    trained = dict(trainer.task.feature.named_parameters())
    assert not any(torch.equal(first[name], p) for name, p in trained.items())
    return {name: p.detach() for name, p in trained.items()}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
