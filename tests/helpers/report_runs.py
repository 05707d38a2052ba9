"""Folders as trainings of detectors leave them, without the training, and a reader of the page about them."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

CLASSES = ("zero", "one", "two")
VOID = {"meta", "link", "img", "br"}


def write_run(folder: Path, level: float = 30.0, seed: int = 0, max_iter: int = 40, **changes: Any) -> Path:
    """An OUTPUT_DIR whose last AP is `level` plus an irrational number.

    Args:
        changes: `teacher`: the teacher's folder, which makes it a DKD student; `lines`: of metrics.json in place of
            those of a finished training; `info`: run.json.
    """
    folder.mkdir(parents=True)
    config = {
        "MODEL": {"META_ARCHITECTURE": "DistilledRCNN"},
        "KD": {"LOSS": {"NAME": "none"}, "TEACHER": {"WEIGHTS": ""}},
        "SOLVER": {"MAX_ITER": max_iter, "OPTIMIZER": "sgd"},
        "SEED": seed,
        "OUTPUT_DIR": str(folder),
    }
    if teacher := changes.get("teacher"):
        config["KD"] = {"LOSS": {"NAME": "dkd"}, "TEACHER": {"WEIGHTS": str(teacher / "model_final.pth")}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = changes.get("lines", finished_lines(level, max_iter, distilled=bool(teacher)))
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if "info" in changes:
        (folder / "run.json").write_text(json.dumps(changes["info"]))
    return folder


def finished_lines(level: float, max_iter: int, distilled: bool = False) -> list[dict[str, float]]:
    """metrics.json of a training that was evaluated at its half and at its end."""
    terms = {"loss_kd_tckd": 0.123456789, "topk/K": 3.0, "momentum/tcg": 0.825} if distilled else {}
    lines = [
        {"iteration": i, "time": 0.25, "total_loss": 2 - i / max_iter, "loss_cls": 1 - i / max_iter, **terms}
        for i in range(9, max_iter, 10)
    ]
    lines[len(lines) // 2]["bbox/AP"] = level / math.pi
    ap = level + math.sqrt(2) / 10
    by_class = {f"bbox/AP-{name}": ap + 7 * index / math.e for index, name in enumerate(CLASSES)}
    sizes = {"bbox/AP50": ap * 1.3, "bbox/AP75": ap * 0.9, "bbox/APs": ap / 3, "bbox/APm": ap, "bbox/APl": math.nan}
    return [*lines, {**lines[-1], "iteration": max_iter, "bbox/AP": ap, **sizes, **by_class}]


class Page(HTMLParser):
    """What a browser would see of a page.

    Attributes:
        numbers: (key, run) → the full values of numbers that name where they come from, and their text.
        rows: the words of every table row.
        images, addresses: sources of the pictures; all addresses in the page.
        text: without tags.
    """

    def __init__(self, content: str) -> None:
        super().__init__()
        self.numbers: dict[tuple[str, str], set[tuple[float, str]]] = {}
        self.rows: list[list[str]] = []
        self.images: list[str] = []
        self.addresses: list[str] = []
        self.text, self.open, self.number = "", [], None
        self.feed(content)
        assert self.open == [], f"not closed: {self.open}"
        self.text = re.sub(r"\s+", " ", self.text)
        self.rows = [[" ".join(word.split()) for word in row] for row in self.rows]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(given["src"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "data":
            self.number = (given.get("data-key", ""), given.get("data-run", "")), float(given["value"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data
        if self.open[-1:] == ["data"]:
            key, value = self.number
            self.numbers.setdefault(key, set()).add((value, data.strip()))
