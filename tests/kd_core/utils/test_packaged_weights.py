"""ImageNet weights that are on this machine already."""

from pathlib import Path

import pytest
import timm
import torch

from kd_core.utils.packaged_weights import weights_at_hand


def test_a_package_of_weights_is_found_by_the_networks_name() -> None:
    assert weights_at_hand("tf_efficientnet_lite2", timm) == "efficientnet-lite2"
    assert all(weights_at_hand(name, timm) == "" for name in ("cifar_resnet8", "resnet18", "my own"))


def test_weights_that_timm_has_fetched_are_found_in_the_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").touch()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    assert weights_at_hand("resnet18", timm) == "timm" and weights_at_hand("resnet34", timm) == ""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    address = timm.get_pretrained_cfg("gcvit_tiny").url  # on no hub
    assert weights_at_hand("gcvit_tiny", timm) == ""
    (tmp_path / "checkpoints" / address.split("/")[-1]).touch()
    assert weights_at_hand("gcvit_tiny", timm) == "timm"
