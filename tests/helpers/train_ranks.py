"""One process of a gloo group, started by torchrun from test_distributed.py.

torchrun … train_ranks.py CONFIG_FILE OUTPUT [KEY VALUE …]: trains, and saves what this rank ended with.
"""

import sys
from pathlib import Path

import torch

from kd_cls.build import build_trainer
from kd_cls.config import load_cfg
from kd_cls.distributed import start_process
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
        torch.save(state, Path(output, f"rank{process.rank}.pt"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
