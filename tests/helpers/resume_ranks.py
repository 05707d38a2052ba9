"""Run by torchrun: `resume_ranks.py CONFIG …` trains each config, and again from the checkpoint of two iterations.

Each rank leaves the digests of its parameters after both trainings in OUTPUT_DIR/digests.rank<r>.
"""

import sys
from pathlib import Path

from detectron2.utils import comm

from kd_core.utils.state_dict import weights_digest
from kd_det.engine.launch import argument_parser, join_process_group, setup
from kd_det.engine.trainer import DistillationTrainer


def train(config: str, *options: str) -> str:
    """The digest of the parameters at the end of a training."""
    args = argument_parser("").parse_args(["--config-file", config, "--num-gpus", "0", *options])
    trainer = DistillationTrainer(setup(args))
    trainer.resume_or_load(resume=args.resume)
    assert trainer.start_iter == (2 if args.resume else 0)
    trainer.train()
    return weights_digest(dict(trainer.checkpointer.model.named_parameters()))


if __name__ == "__main__":
    join_process_group(0)
    for path in sys.argv[1:]:
        output = Path(path).parent / "output"
        whole = train(path)
        comm.synchronize()
        if comm.is_main_process():
            (output / "last_checkpoint").write_text("model_0000001.pth")
        comm.synchronize()
        (output / f"digests.rank{comm.get_rank()}").write_text(f"{whole} {train(path, '--resume')}")
