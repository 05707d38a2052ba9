"""timm's extractors under detectron2's FPN: maps, names, weights, frozen layers, and what is refused."""

import ast
import copy
import logging
import re
from pathlib import Path

import pytest
import timm
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.modeling.backbone import build_backbone
from safetensors.torch import save_file
from timm.models import FeatureInfo
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import mobilenet_v2

import kd_cls.models  # noqa: F401  (registers kd_mobilenetv1, which gives no maps)
import kd_det
from kd_core.utils.errors import UserError
from kd_det.checkpoint.classifier_weights import Classifier
from kd_det.checkpoint.convert_classifier import convert, save
from kd_det.checks import failures, training_checks
from kd_det.config import kd_defaults, merge_list
from kd_det.engine.hooks.checkpointing import SaveStudentConfig
from kd_det.engine.trainer import DistillationTrainer
from kd_det.export import read_student, save_plain
from kd_det.modeling.backbone import TimmBackbone
from kd_det.modeling.teacher.build import teacher_config

SWIN = "[['strict_img_size', False], ['embed_dim', 12], ['depths', [1, 1, 1, 1]], ['num_heads', [1, 1, 1, 1]]]"
NETWORKS = [
    ("mobilenetv2_100", "[]"),
    ("efficientnet_b0", "[]"),
    ("convnext_atto", "[['drop_path_rate', 0.1]]"),
    ("resnet18", "[]"),
    ("swin_tiny_patch4_window7_224", SWIN),  # channels last
]
TIMM = ("MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0)
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


def config(name, *overrides):
    """A config whose backbone is timm's `name` under a narrow FPN."""
    cfg = kd_defaults()
    merge_list(cfg, [str(w) for w in (*TIMM, "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.TIMM.NAME", name, *overrides)])
    return cfg


def backbone(name, *overrides):
    return build_backbone(config(name, *overrides))


def timm_keywords(text):
    return {key: tuple(v) if isinstance(v, list) else v for key, v in ast.literal_eval(text)}


@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_the_fpn_has_the_strides_of_faster_rcnn_and_the_maps_are_timms_own(name, kwargs):
    fpn = backbone(name, "MODEL.TIMM.KWARGS", kwargs).eval()
    images = torch.randn(2, 3, 64, 96)
    maps = fpn(images)
    assert {level: 64 // m.shape[2] for level, m in maps.items()} == STRIDES
    assert {level: spec.stride for level, spec in fpn.output_shape().items()} == STRIDES
    extractor = timm.create_model(name, features_only=True, **timm_keywords(kwargs)).eval()
    extractor.load_state_dict(fpn.bottom_up.state_dict())  # strictly: the names are timm's
    expected = extractor(images)[-4:]
    for ours, theirs in zip([fpn.bottom_up(images)[f"res{k}"] for k in (2, 3, 4, 5)], expected, strict=True):
        assert torch.equal(ours, theirs.permute(0, 3, 1, 2) if "swin" in name else theirs)


@pytest.mark.parametrize(("name", "kwargs"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_every_weight_of_the_network_is_trained(name, kwargs):
    fpn = backbone(name, "MODEL.TIMM.KWARGS", kwargs)
    sum(m.square().mean() for m in fpn(torch.randn(2, 3, 64, 64)).values()).backward()
    assert [key for key, p in fpn.named_parameters() if p.grad is None] == []


def test_images_may_have_another_number_of_channels():
    fpn = backbone("mobilenetv2_050", "MODEL.PIXEL_MEAN", [128.0], "MODEL.PIXEL_STD", [64.0])
    assert fpn(torch.randn(1, 1, 64, 64))["p2"].shape == (1, 8, 16, 16)


def test_what_convert_weights_writes_for_mobilenet_fits(tmp_path):
    source = mobilenet_v2()
    save(convert(Classifier(source.state_dict())), tmp_path / "mv2.pth")
    holder = nn.Module()
    holder.backbone = backbone("mobilenetv2_100").eval()
    loaded = DetectionCheckpointer(holder, save_to_disk=False).load(str(tmp_path / "mv2.pth"))
    assert loaded.keys() == {"__author__"}
    fpn_weights = {key for key in holder.state_dict() if ".bottom_up." not in key}
    loaded = torch.load(tmp_path / "mv2.pth", weights_only=True)["model"]
    wanted = {key for key in holder.state_dict() if not key.endswith("num_batches_tracked")}
    assert set(loaded) == wanted - fpn_weights
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(
        holder.backbone.bottom_up(images)["res5"], source.features[:18].eval()(images), rtol=1e-4, atol=1e-5
    )


def test_a_frozen_norm_acts_as_in_eval_mode_and_keeps_its_activation():
    plain, frozen = backbone("mobilenetv2_100").eval(), backbone("mobilenetv2_100", "MODEL.TIMM.NORM", "FrozenBN")
    for module in plain.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 2)
            module.weight.data.uniform_(0.5, 1.5), module.bias.data.normal_()
    state = {key: v for key, v in plain.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert frozen.state_dict().keys() == state.keys()
    frozen.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    for level, expected in plain(images).items():
        assert torch.allclose(frozen.train()(images)[level], expected, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, _BatchNorm) for module in frozen.modules())
    assert all(torch.equal(value, state[key]) for key, value in frozen.state_dict().items())
    assert not any(key.startswith("bottom_up") and "bn" in key for key, _ in frozen.named_parameters())


def test_synchronised_norms_keep_names_and_activations():
    fpn = backbone("mobilenetv2_100", "MODEL.TIMM.NORM", "SyncBN")
    norms = [module for module in fpn.modules() if isinstance(module, _BatchNorm)]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert fpn.state_dict().keys() == backbone("mobilenetv2_100").state_dict().keys()
    assert isinstance(fpn.bottom_up.extractor.blocks[0][0].bn1.act, nn.ReLU6)


@pytest.mark.parametrize(
    ("name", "stage", "frozen"),
    [
        ("mobilenetv2_100", 2, ("conv_stem.", "blocks.0.", "blocks.1.")),
        ("mobilenetv2_100", 1, ("conv_stem.", "blocks.0.")),
        ("resnet18", 2, ("conv1.", "layer1.")),
        ("convnext_atto", 3, ("stem_", "stages_0.", "stages_1.")),
    ],
)
def test_freeze_at_freezes_what_the_map_of_that_stride_is_made_of(name, stage, frozen):
    bottom_up = backbone(name, "MODEL.BACKBONE.FREEZE_AT", stage).train().bottom_up
    for key, p in bottom_up.named_parameters():
        assert p.requires_grad != key.startswith(frozen), key
    before = copy.deepcopy(bottom_up.state_dict())
    bottom_up(torch.randn(2, 3, 64, 64))
    moved = {key for key, value in bottom_up.state_dict().items() if not torch.equal(value, before[key])}
    assert not any(key.startswith((*frozen, "bn1.")) for key in moved)  # nor do the statistics of the stem move
    assert (name == "convnext_atto") == (not moved)


def test_both_roots_see_a_layer_that_is_replaced_or_copied():
    fpn = backbone("resnet18")
    copied = copy.deepcopy(fpn)
    for other in (fpn, copied):
        assert other.bottom_up.extractor._modules is other.bottom_up._modules
    fpn.bottom_up.layer4 = nn.Identity()
    assert isinstance(fpn.bottom_up.extractor.layer4, nn.Identity)
    assert not isinstance(copied.bottom_up.extractor.layer4, nn.Identity)
    copied.eval()
    assert not copied.bottom_up.extractor.training and fpn.bottom_up.extractor.training
    assert copied.double().bottom_up(torch.zeros(1, 3, 32, 32).double())["res2"].dtype == torch.float64


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_of_a_classifier_is_loaded_by_timms_mechanism(tmp_path, suffix):
    source = timm.create_model("mobilenetv2_100", num_classes=7)
    path = str(tmp_path / f"mv2{suffix}")
    (save_file if suffix == ".safetensors" else torch.save)(source.state_dict(), path)
    bottom_up = backbone("mobilenetv2_100", "MODEL.TIMM.WEIGHTS", path).bottom_up
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in bottom_up.state_dict().items())


def test_pretrained_is_timms_own_mechanism(tmp_path):
    source = timm.create_model("mobilenetv2_050")
    torch.save(source.state_dict(), tmp_path / "mv2.pth")  # in place of timm's own address
    overlay = [["pretrained_cfg_overlay", {"file": str(tmp_path / "mv2.pth")}]]
    pretrained = ("MODEL.TIMM.PRETRAINED", True, "MODEL.TIMM.KWARGS", overlay)
    bottom_up = backbone("mobilenetv2_050", *pretrained).bottom_up
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in bottom_up.state_dict().items())
    later = backbone("mobilenetv2_050", *pretrained, "MODEL.WEIGHTS", "student.pth").bottom_up
    assert not torch.equal(later.conv_stem.weight, source.conv_stem.weight)  # MODEL.WEIGHTS is to bring them


def test_a_file_under_older_names_is_renamed_as_timm_renames_its_own(tmp_path):
    source = timm.create_model("convnext_atto")
    published = {}  # the names of ConvNeXt's own repository
    for key, value in source.state_dict().items():
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample", f"downsample_layers.{i}")
        key = key.replace("stem.", "downsample_layers.0.").replace("blocks.", "").replace("conv_dw", "dwconv")
        published[key.replace("mlp.fc", "pwconv").replace("head.fc", "head").replace("head.norm", "norm")] = value
    torch.save({"model": published}, tmp_path / "convnext.pth")
    bottom_up = backbone("convnext_atto", "MODEL.TIMM.WEIGHTS", tmp_path / "convnext.pth").bottom_up
    assert torch.equal(bottom_up.stages_1.downsample[1].weight, source.stages[1].downsample[1].weight)
    assert torch.equal(bottom_up.stages_3.blocks[0].mlp.fc1.weight, source.stages[3].blocks[0].mlp.fc1.weight)


def test_a_file_that_lacks_a_weight_is_refused(tmp_path):
    state = timm.create_model("mobilenetv2_100").state_dict()
    del state["blocks.3.0.conv_pw.weight"]
    torch.save(state, tmp_path / "mv2.pth")
    message = r"mv2.pth does not fit MODEL.TIMM.NAME mobilenetv2_100: 1 of 51 .* the first is blocks.3.0.conv_pw.weight"
    with pytest.raises(UserError, match=message):
        backbone("mobilenetv2_100", "MODEL.TIMM.WEIGHTS", tmp_path / "mv2.pth")


def test_a_file_of_another_network_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(timm.create_model("mobilenetv2_050").state_dict(), path)
    with pytest.raises(UserError, match=r"MODEL.TIMM.WEIGHTS .*other.pth: timm cannot load that file .*size mismatch"):
        backbone("mobilenetv2_100", "MODEL.TIMM.WEIGHTS", path)
    with pytest.raises(UserError, match=r"NAME convnext_atto, .*other.pth: timm cannot load that file into the"):
        backbone("convnext_atto", "MODEL.TIMM.WEIGHTS", path)


def test_weights_of_the_whole_detector_make_those_of_the_backbone_needless(caplog):
    with caplog.at_level(logging.INFO, "kd_det"):
        backbone("resnet18", "MODEL.WEIGHTS", "student.pth", "MODEL.TIMM.WEIGHTS", "moved_away.pth")
    assert "MODEL.WEIGHTS is given" in caplog.text


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("", (), r"MODEL.TIMM.NAME is empty: name one of timm.list_models\(\)"),
        ("mobilenetv2", (), r"timm has no model 'mobilenetv2'; did you mean mobilenetv2_"),
        ("qqq", (), r"timm has no model 'qqq'; see timm.list_models"),
        ("resnet18.no_such_tag", (), r"MODEL.TIMM.NAME resnet18.no_such_tag: timm cannot build the .*no_such_tag"),
        ("kd_mobilenetv1", (), r"kd_mobilenetv1: timm cannot build the feature extractor"),
        ("vit_tiny_patch16_224", (), r"IN_FEATURES asks for res2, res3, res5, .* its maps are res4 \(stride 16\)"),
        ("resnet18", ("MODEL.TIMM.OUT_INDICES", "[2, 3, 4]"), r"asks for res2, .*list more stages in MODEL.TIMM.OUT_"),
        ("resnet18", ("MODEL.TIMM.OUT_INDICES", "[2, 9]"), r"MODEL.TIMM.OUT_INDICES \[2, 9\]: timm cannot build the"),
        ("resnet18", ("MODEL.TIMM.KWARGS", "[['width', 3]]"), r"MODEL.TIMM.KWARGS \[\['width', 3\]\].*'width'"),
        ("resnet18", ("MODEL.TIMM.KWARGS", "['width']"), r"is a list of \[argument, value\], .* one entry is 'width'"),
        ("resnet18", ("MODEL.TIMM.NORM", "frozen"), r"MODEL.TIMM.NORM is 'frozen', expected one of BN, Frozen"),
        ("convnext_atto", ("MODEL.TIMM.NORM", "FrozenBN"), r"convnext_atto: .* the network has no BatchNorm"),
        (
            "convnext_atto",
            ("MODEL.BACKBONE.FREEZE_AT", 1),
            r"no map of that stride: .* 0 \(none\) or one of 2, 3, 4, 5",
        ),
        ("swin_tiny_patch4_window7_224", (), r"takes no image of 64×96 px .*\[\[strict_img_size, False\]\]"),
        ("resnet18", ("MODEL.TIMM.WEIGHTS", "none.pth"), r"MODEL.TIMM.WEIGHTS: there is no file none.pth"),
        ("resnet18", ("MODEL.TIMM.WEIGHTS", "a", "MODEL.TIMM.PRETRAINED", True), r"both bring weights: keep one"),
    ],
)
def test_what_cannot_be_a_backbone_is_refused_by_its_key(name, overrides, message):
    with pytest.raises(UserError, match=message):
        backbone(name, *overrides)


def test_a_network_whose_maps_do_not_fit_an_fpn_is_refused():
    class Unpadded(nn.Conv2d):
        """An extractor of one map, 30 × 46 of 64 × 96, where stride 2 promises 32 × 48."""

        feature_info = FeatureInfo([{"num_chs": 4, "reduction": 2, "module": ""}], (0,))

        def forward(self, images):
            return [super().forward(images)]

    with pytest.raises(UserError, match=r"its map res1 .* is \(1, 4, 30, 46\), and an FPN needs \(1, 4, 32, 48\)"):
        TimmBackbone(Unpadded(3, 4, 5, stride=2)).check_maps(["res1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"), r"build_resnet_fpn_backbone does not read it"),
        (("MODEL.TIMM.NORM", "FrozenBN"), r"statistics of random layers would stay frozen"),
        (("MODEL.BACKBONE.FREEZE_AT", 2), r"random layers would stay frozen"),
    ],
)
def test_settings_that_could_not_train_are_refused_before_training(overrides, message):
    def problems(*more):
        return "\n".join(failures(training_checks(config("resnet18", *overrides, *more))))

    assert re.search(message, problems())
    if "BACKBONE.NAME" not in overrides[0]:
        assert not re.search(message, problems("MODEL.TIMM.PRETRAINED", True))


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_another_normalisation_than_the_pretrained_networks_is_warned_of(caplog, order):
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    right = [mean, std] if order == "RGB" else [mean[::-1], std[::-1]]
    keys = ("MODEL.WEIGHTS", "student.pth", "INPUT.FORMAT", order, "MODEL.PIXEL_MEAN", right[0], "MODEL.PIXEL_STD")
    backbone("resnet18", *keys, right[1])
    assert "PIXEL" not in caplog.text
    backbone("resnet18", *keys, [1.0, 1.0, 1.0])
    assert f"MODEL.PIXEL_STD is [1.0, 1.0, 1.0], but resnet18 was trained with {right[1]}" in caplog.text


def student(tiny_cfg, *overrides):
    """A tiny detector with a MobileNetV2."""
    return tiny_cfg(*TIMM, "MODEL.TIMM.NAME", "mobilenetv2_100", "INPUT.MIN_SIZE_TEST", 64, *overrides)


def test_plain_detectron2_loads_the_student_once_it_knows_the_keys_of_its_backbone(tiny_cfg, tmp_path):
    (tmp_path / "output").mkdir()
    cfg = student(tiny_cfg, "KD.LOSS.NAME", "aekt", "MODEL.TIMM.PRETRAINED", True, "MODEL.WEIGHTS", "imagenet.pth")
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "output/model_final.pth")
    SaveStudentConfig(cfg).before_train()
    path = str(tmp_path / "output/student.yaml")
    with pytest.raises(KeyError, match=r"MODEL\.TIMM"):
        get_cfg().merge_from_file(path)
    assert "kd_det.add_timm_config(cfg)" in Path(path).read_text().splitlines()[0]
    plain = get_cfg()
    kd_det.add_timm_config(plain)
    plain.merge_from_file(path)
    predictor = DefaultPredictor(plain)
    assert type(predictor.model).__name__ == "GeneralizedRCNN"
    saved = predictor.model.state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())


def test_evaluating_the_last_checkpoint_asks_for_no_start_weights(tiny_cfg, tmp_path):
    cfg = student(tiny_cfg, "DATASETS.TEST", "()")
    (tmp_path / "output").mkdir()
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "output/model_final.pth")
    (tmp_path / "output/last_checkpoint").write_text("model_final.pth")
    merge_list(cfg, ["MODEL.TIMM.WEIGHTS", str(tmp_path / "gone.pth")])
    with pytest.raises(UserError, match=r"gone\.pth"):
        build_model(cfg)
    assert DistillationTrainer.evaluate_only(cfg, resume=True) == {}


def test_an_exported_student_says_what_its_backbone_needs(tiny_cfg, tmp_path):
    cfg = student(tiny_cfg)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    _, path = save_plain(read_student(tmp_path), tmp_path)
    assert "kd_det.add_timm_config(cfg)" in path.read_text().splitlines()[0]


def test_a_teachers_own_start_weights_are_not_fetched(tiny_cfg, tmp_path):
    (tmp_path / "t.yaml").write_text(student(tiny_cfg, "MODEL.TIMM.PRETRAINED", True).dump())
    cfg = tiny_cfg("KD.TEACHER.CONFIG_FILE", tmp_path / "t.yaml")
    assert teacher_config(cfg).MODEL.TIMM.NAME == "mobilenetv2_100"
    assert teacher_config(cfg).MODEL.TIMM.PRETRAINED is False


def test_a_retinanet_reads_no_p2_so_none_is_made():
    words = ("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.RETINANET.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"])
    shape = backbone("resnet10t", *words, "MODEL.FPN.IN_FEATURES", "[]").output_shape()
    assert list(shape) == ["p3", "p4", "p5", "p6", "p7"]


def test_a_timm_teacher_teaches_a_timm_student(tiny_cfg, tmp_path, batch, storage):
    (tmp_path / "t.yaml").write_text(student(tiny_cfg, "MODEL.TIMM.NAME", "resnet10t").dump())
    model = build_model(student(tiny_cfg, "KD.LOSS.NAME", "dkd", "KD.TEACHER.CONFIG_FILE", tmp_path / "t.yaml"))
    losses = model(batch)
    assert {"loss_kd_tckd", "loss_kd_nckd"} <= set(losses)
    (losses["loss_kd_tckd"] + losses["loss_kd_nckd"]).backward()
    assert model.backbone.bottom_up.conv_stem.weight.grad.abs().sum() > 0
