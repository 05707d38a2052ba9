"""How many test images of CIFAR-100 plain timm classifies rightly with a saved student.

    python tests/helpers/plain_timm.py CHECKPOINT FOLDER COUNT [--name cifar_resnet8x4]

Of this project it imports the registration of the networks alone: what `kd_cls.evaluate` says is compared with it.
FOLDER holds the lossless strips of 500 images; COUNT of the 10,000 test images are looked at, evenly spaced.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm import create_model
from timm.models import load_checkpoint

import kd_cls.models  # noqa: F401  (registers cifar_<name> with timm)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--name", default="cifar_resnet8x4")
    options = parser.parse_args()
    strips = sorted((options.folder / "webp").glob("test_*.webp"))
    images = np.concatenate([np.asarray(Image.open(path).convert("RGB")).reshape(-1, 32, 32, 3) for path in strips])
    places = np.arange(options.count) * len(images) // options.count
    images = torch.from_numpy(images[places]).permute(0, 3, 1, 2).float() / 255
    target = torch.from_numpy(np.load(options.folder / "test_fine_labels.npy")[places])
    model = create_model(options.name, num_classes=100)
    load_checkpoint(model, options.checkpoint)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.inference_mode():
        guesses = [model.eval()((part - mean) / std).argmax(1) for part in images.split(250)]
    right = int((torch.cat(guesses) == target).sum())
    print(right)
    return right


if __name__ == "__main__":
    main()
