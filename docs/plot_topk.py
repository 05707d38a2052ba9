"""Draw docs/img/topk_schedule.png: the share of classes that the dynamic top-k mask admits over training."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from kd_core.topk import TopKSchedule

CLASSES = 100


def main() -> None:
    schedule = TopKSchedule()
    progress = [i / 1000 for i in range(1001)]
    plt.figure(figsize=(6, 3))
    plt.plot(progress, [schedule.k(p, CLASSES) for p in progress])
    plt.xlabel("progress = iteration / max_iter")
    plt.ylabel(f"K of {CLASSES - 1} non-target classes")
    plt.title("TopKSchedule(): easy, transition, hard")
    plt.tight_layout()
    plt.savefig(Path(__file__).parent / "img" / "topk_schedule.png", dpi=80)


if __name__ == "__main__":
    main()
