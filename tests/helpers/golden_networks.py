"""Facts of the released networks: state-dict keys and shapes, and outputs and maps under weights given by a formula.

    python tests/helpers/golden_networks.py --mdistiller PATH

writes tests/golden/cifar_state_dicts.json, cifar_outputs.json and cifar_maps.json anew from a checkout of
github.com/megvii-research/mdistiller. The tests read those files and the formula below, and need no such checkout.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import sys
import types
import zlib
from pathlib import Path

import torch

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CLASSES, IMAGES = 10, 2  # of the stored outputs
# Our names of the released networks; the others differ from theirs by the prefix only.
RELEASED = {
    "cifar_resnet18": "ResNet18",
    "cifar_resnet50": "ResNet50",
    "cifar_mobilenetv2": "MobileNetV2",
    "cifar_shufflev1": "ShuffleV1",
    "cifar_shufflev2": "ShuffleV2",
}


def spread(count: int, offset: int) -> torch.Tensor:
    """`count` float64 numbers in [0, 1), the same on every machine: multiples of an odd integer modulo 2^32."""
    return (torch.arange(count, dtype=torch.int64) * 2654435761 + offset).remainder(2**32).double() / 2**32


def formula_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Float64 values for every tensor of a state dict, a function of its key, shape and nothing else."""
    filled = {}
    for key, tensor in state.items():
        u = spread(tensor.numel(), zlib.crc32(key.encode())).reshape(tensor.shape)
        if key.endswith("num_batches_tracked"):
            filled[key] = tensor
        elif key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
            filled[key] = 0.5 + u
        elif tensor.ndim == 1:  # biases and running means
            filled[key] = 0.4 * u - 0.2
        else:  # a sum over the fan-in of variance about one
            filled[key] = (2 * u - 1) * (3 / tensor[0].numel()) ** 0.5
    return filled


def formula_outputs(model: torch.nn.Module, size: int) -> dict[str, list[list[float]]]:
    """Logits (IMAGES, CLASSES) in eval and in training mode, for formula weights and a formula image."""
    model.double().load_state_dict(formula_state(model.state_dict()))
    outputs = {}
    with torch.no_grad():
        for mode in ("eval", "train"):
            logits = model.train(mode == "train")(formula_images(size))
            logits = logits[0] if isinstance(logits, tuple) else logits  # the released networks return features too
            outputs[mode] = logits[:, :CLASSES].tolist()
    return outputs


def summary(maps: list[torch.Tensor]) -> list[list[float]]:
    """[channels, height, mean, mean absolute value] of every map."""
    return [[*m.shape[1:3], float(m.mean()), float(m.abs().mean())] for m in maps]


def formula_images(size: int) -> torch.Tensor:
    """A batch of images that is the same on every machine."""
    return 2 * spread(IMAGES * 3 * size * size, 0).reshape(IMAGES, 3, size, size) - 1


def released_maps(model: torch.nn.Module, size: int) -> dict[str, list[list[float]]]:
    """What ReviewKD's released code may compare: the maps of the stages after and before their activation, pooled."""
    model.double().eval().load_state_dict(formula_state(model.state_dict()))
    with torch.no_grad():
        found = model(formula_images(size))[1]
    stem = 0 if size == 224 else 1  # MobileNetV1 lists no stem
    maps = {name: found[name][stem:] for name in ("feats", "preact_feats") if name in found}
    return {name: summary([*those, found["pooled_feat"][:, :, None, None]]) for name, those in maps.items()}


def _released_builders(checkout: Path) -> dict[str, types.FunctionType]:
    """Our name → a function (num_classes) that builds the released network. Only its model files are imported."""
    for name in ("mdistiller", "mdistiller.models"):  # their __init__ files want packages that the models do not
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    cifar = importlib.import_module("mdistiller.models.cifar").cifar_model_dict
    imagenet = importlib.import_module("mdistiller.models.imagenet.mobilenetv1")
    theirs = RELEASED | {f"cifar_{name}": name for name in cifar if name not in RELEASED.values()}
    builders = {ours: lambda n, build=cifar[name][0]: build(num_classes=n) for ours, name in sorted(theirs.items())}
    return builders | {"kd_mobilenetv1": lambda _: imagenet.MobileNetV1()}


def _write(name: str, facts: dict[str, dict]) -> None:
    """One network per line, whole or not at all."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in facts.items())
    temporary = GOLDEN / f"{name}.tmp"
    temporary.write_text(f"{{\n{lines}\n}}\n")
    os.replace(temporary, GOLDEN / name)


def main() -> None:
    """Read the released networks, write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mdistiller", type=Path, required=True, help="a checkout of megvii-research/mdistiller")
    states, outputs, maps = {}, {}, {}
    for name, build in _released_builders(parser.parse_args().mdistiller).items():
        with contextlib.redirect_stdout(io.StringIO()):  # one of them prints
            network, small = build(100), build(CLASSES)
        states[name] = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
        size = 224 if name == "kd_mobilenetv1" else 32
        outputs[name], maps[name] = formula_outputs(small, size), released_maps(small, size)
    _write("cifar_state_dicts.json", states)
    _write("cifar_outputs.json", outputs)
    _write("cifar_maps.json", maps)


if __name__ == "__main__":
    main()
