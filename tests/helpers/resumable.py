"""A small DeepKD training that saves every step and resumes from what is saved, started by test_resume.py.

python resumable.py FOLDER STEPS DIE_AT …: an undisturbed training in FOLDER/undisturbed; in FOLDER/killed one that is
killed, as by kill -9, in the middle of each of these steps, and then ends. Each prints its folder's name, the exit code
and the step it has saved. The processes are forked, so that torch is imported once.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from kd_core.losses import DKDLoss
from kd_core.optim import deepkd_sgd
from kd_core.optim.gsnr import AutoMomenta
from kd_core.streams import backward_streams


def streams(model: nn.Module, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    logits, target = model(torch.randn(16, 6, generator=generator)), torch.randint(5, (16,), generator=generator)
    terms = DKDLoss()(logits, torch.randn(16, 5, generator=generator), target)
    return {"tog": nn.functional.cross_entropy(logits, target), "tcg": terms["tckd"], "ncg": terms["nckd"]}


def train(folder: Path, steps: int, die_at: int | None) -> None:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 5))
    optimizer = deepkd_sgd(model.parameters(), 0.01, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=7)
    auto = AutoMomenta(optimizer, model.named_parameters(), warmup=15, every=2)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "auto": auto}
    file, start = folder / "last.pt", 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        start = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(start, steps):
        auto.observe(streams(model, step), step)
        optimizer.zero_grad()
        backward_streams(streams(model, step), optimizer, scaler)
        optimizer.clip_grad_norm_(1.0)
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, f"{file}.new")
        os.replace(f"{file}.new", file)
    torch.save({"parameters": list(model.parameters()), "momenta": auto.momenta}, folder / "end.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, steps, *deaths = Path(sys.argv[1]), *map(int, sys.argv[2:])
    for name, die_at in (("undisturbed", None), *(("killed", step) for step in deaths), ("killed", None)):
        process = multiprocessing.get_context("fork").Process(target=train, args=(folder / name, steps, die_at))
        process.start()
        process.join()
        print(name, process.exitcode, torch.load(folder / name / "last.pt", weights_only=True)["step"])
