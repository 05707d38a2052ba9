"""The teacher's logits on disk: computed once for each augmented image, then read.

One memory-mapped file per (augmentation) epoch holds a fixed-size record per image. Its checksum makes a record that
was half written in a crash count as absent. `meta.json` names the teacher, data and augmentation of the logits;
a cache of any other is refused.
"""

import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_core.utils.errors import UserError
from kd_core.utils.files import write_text

KINDS = ("full", "topk")


class LogitCache:
    """Logits (N, C) of a teacher for the images of each epoch.

    "full" stores float32: training is equal to the bit, as long as KD.TEACHER.FOLD_BN and CHANNELS_LAST stay as they
    were: they move the last bits and are not in `identity`. "topk" stores the k largest log-probabilities in float16
    (relative error 2⁻¹¹) and the total probability of all others, which is spread evenly over them when read (ours).

    Args:
        folder: created if it does not exist.
        kind: "full" or "topk".
        num_images, num_classes: N and C.
        epochs: after how many epochs the augmented images repeat; 1 without augmentation.
        identity: what the logits depend on (teacher, data, augmentation, seed), as plain values.
        topk: number of classes stored by "topk".

    Raises:
        UserError: unknown kind, topk ≥ C, `folder` holds another cache, or the disk is too small.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        num_images: int,
        num_classes: int,
        epochs: int,
        identity: dict[str, Any],
        topk: int = 20,
        views: int = 1,
    ) -> None:
        if kind not in KINDS:
            raise UserError(f"KD.TEACHER.CACHE is {kind!r}, expected one of none, {', '.join(KINDS)}")
        if kind == "topk" and not 0 < topk < num_classes:
            raise UserError(
                f"KD.TEACHER.CACHE_TOPK is {topk}, expected 1 … {num_classes - 1} for {num_classes} classes"
            )
        self.folder, self.kind, self.num_images, self.num_classes = folder, kind, num_images, num_classes
        self.epochs = epochs
        self.record = np.dtype(
            [("check", "<u4"), ("value", "<f4", (num_classes,))]
            if kind == "full"
            else [("check", "<u4"), ("value", "<f2", (topk,)), ("index", "<i4", (topk,)), ("rest", "<f4")]
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.check_identity(
            {"kind": kind, "num_images": num_images, "num_classes": num_classes, "topk": topk, **identity}
        )
        self.check_space(views)
        self.maps: dict[int, np.memmap] = {}

    def check_identity(self, identity: dict[str, Any]) -> None:
        """Write meta.json, or compare it with the existing one."""
        path = self.folder / "meta.json"
        identity = json.loads(json.dumps(identity))
        if not path.is_file():
            write_text(path, json.dumps(identity, indent=1))
        found = json.loads(path.read_text())
        for name in identity:
            if found.get(name) != identity[name]:
                raise UserError(
                    f"KD.TEACHER.CACHE_DIR: {self.folder} is a cache of another {name} ({found.get(name)}, this run "
                    f"has {identity[name]}): name another folder, or delete it"
                )

    def check_space(self, views: int) -> None:
        """Refuse a cache of so many views that does not fit on the disk, before training starts."""
        needed = self.num_images * self.epochs * self.record.itemsize * views
        files = self.folder.glob("epoch_*.bin" if views == 1 else "**/epoch_*.bin")  # the second view's lie below
        present = sum(file.stat().st_blocks * 512 for file in files)
        free = shutil.disk_usage(self.folder).free
        if needed - present > free:
            raise UserError(
                f"KD.TEACHER.CACHE: {self.folder} would take {needed / 1e9:.1f} GB ({self.num_images} images × "
                f"{self.epochs} epochs × {self.record.itemsize} bytes), and {free / 1e9:.1f} GB are free: set "
                "DATA.AUGMENTATION_EPOCHS, KD.TEACHER.CACHE topk or a smaller CACHE_TOPK"
            )

    def records(self, epoch: int) -> np.memmap:
        """The memory-mapped records of an epoch, in a sparse file: zeros where nothing has been written."""
        slot = epoch % self.epochs
        if slot not in self.maps:
            path = self.folder / f"epoch_{slot:04d}.bin"
            with open(path, "ab") as file:  # other processes may have it open: nothing is cut off
                file.truncate(self.num_images * self.record.itemsize)
            self.maps = {slot: np.memmap(path, dtype=self.record, mode="r+")}
        return self.maps[slot]

    def read(self, epoch: int, indices: torch.Tensor) -> torch.Tensor | None:
        """Logits (n, C) of the images `indices` (n,) in `epoch`, or None if any is absent."""
        rows = np.array(self.records(epoch)[indices.numpy()])
        if any(row["check"] != checksum(row) for row in rows):
            return None
        if self.kind == "full":
            return torch.from_numpy(rows["value"].copy())
        return spread_rest(rows, self.num_classes)

    def write(self, epoch: int, indices: torch.Tensor, logits: torch.Tensor) -> None:
        """Store the logits (n, C) of the images `indices` in `epoch`."""
        rows = np.zeros(len(indices), dtype=self.record)
        logits = logits.detach().float().cpu()
        if self.kind == "full":
            rows["value"] = logits.numpy()
        else:
            log_probs = logits.log_softmax(1)
            value, index = log_probs.topk(rows["index"].shape[1], dim=1)
            rest = log_probs.scatter(1, index, -math.inf).logsumexp(1)
            rows["value"], rows["index"] = value.clamp(min=-65504).numpy(), index.numpy()  # float16's smallest number
            rows["rest"] = rest.clamp(min=-1e30).numpy()
        rows["check"] = [checksum(row) for row in rows]
        self.records(epoch)[indices.numpy()] = rows


def checksum(row: np.void) -> int:
    """CRC-32 of a record without its checksum field; never 0, the value of an absent record."""
    return zlib.crc32(row.tobytes()[4:]) or 1


def spread_rest(rows: np.ndarray, num_classes: int) -> torch.Tensor:
    """Log-probabilities (n, C) from the k largest and the total of the rest, spread evenly."""
    index = torch.from_numpy(rows["index"].astype(np.int64))
    rest = torch.from_numpy(rows["rest"].copy()) - math.log(num_classes - index.shape[1])
    return rest[:, None].repeat(1, num_classes).scatter(1, index, torch.from_numpy(rows["value"].astype(np.float32)))
