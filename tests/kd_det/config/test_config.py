"""Configs: unknown keys, wrong types and missing files are named."""

import re

import pytest

from kd_core.utils.errors import UserError
from kd_det.checks import check_before_training, failures, training_checks
from kd_det.config import all_keys, build_box_loss, kd_defaults, merge_file, merge_list
from kd_det.engine.launch import read_config


def test_a_whole_number_serves_where_a_float_is_due(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("KD:\n  LOSS:\n    DKD:\n      BETA: 8\n")
    cfg = kd_defaults()
    merge_file(cfg, str(path))
    assert cfg.KD.LOSS.DKD.BETA == 8.0 and isinstance(cfg.KD.LOSS.DKD.BETA, float)
    merge_list(cfg, ["KD.LOSS.DKD.BETA", "2"])
    assert cfg.KD.LOSS.DKD.BETA == 2.0 and isinstance(cfg.KD.LOSS.DKD.BETA, float)


def test_a_misspelt_key_in_a_file_is_named_with_the_nearest_one(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("KD:\n  TEACHER:\n    WEIGHT: x.pth\n")
    with pytest.raises(UserError, match=r"a.yaml: unknown key KD.TEACHER.WEIGHT; did you mean KD.TEACHER.WEIGHTS\?"):
        merge_file(kd_defaults(), str(path))


def test_a_misspelt_key_on_the_command_line_is_named():
    with pytest.raises(
        ValueError, match=r"the command line: unknown key KD.LOSS.NAMES; did you mean KD.LOSS.NAME\?"
    ):
        merge_list(kd_defaults(), ["KD.LOSS.NAMES", "dkd"])


def test_a_key_in_the_wrong_group_is_found_by_its_name():
    with pytest.raises(UserError, match=r"unknown key SOLVER.DELTA_TOG; did you mean SOLVER.DEEPKD.DELTA_TOG"):
        merge_list(kd_defaults(), ["SOLVER.DELTA_TOG", "0.05"])


@pytest.mark.parametrize(
    ("key", "word", "message"),
    [
        ("KD.LOSS.DKD.BETA", "strong", "KD.LOSS.DKD.BETA is 'strong', expected a number such as 8.0"),
        ("SOLVER.MAX_ITER", "9e4", "SOLVER.MAX_ITER is '9e4', expected a whole number such as 40000"),
        ("KD.LOSS", "dkd", "KD.LOSS is a group of keys .*DKD.*, got 'dkd'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_one_of_the_right(tmp_path, key, word, message):
    with pytest.raises(UserError, match=f"the command line: {message}"):
        merge_list(kd_defaults(), [key, word])
    path, opening = tmp_path / "a.yaml", key.replace(".", ": {")
    path.write_text(f"{opening}: {word}{'}' * key.count('.')}")
    with pytest.raises(UserError, match=f"a.yaml: {message}"):
        merge_file(kd_defaults(), str(path))


def test_a_word_may_look_like_a_number():
    cfg = kd_defaults()
    merge_list(cfg, ["OUTPUT_DIR", "7", "MODEL.WEIGHTS", "", "KD.LOSS.NAME", "None", "SOLVER.STEPS", "(6, 8)"])
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.KD.LOSS.NAME, cfg.SOLVER.STEPS) == ("7", "", "None", (6, 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER:\n  MAX_ITER: 5\n BASE_LR: 1.0\n", r"a.yaml, line 3, column 2: not valid yaml \(.*\)"),
        ("SOLVER: {STEPS: [1, 2\n", r"a.yaml, line 2, column 1: not valid yaml"),
        ("MODEL: !!python/object/apply:os.getcwd []\n", r"a.yaml, line 1, column 8: not valid yaml"),
        ("just words\n", r"a.yaml holds no keys: a config is a mapping like"),
        ("", r"a.yaml holds no keys"),
        ("_BASE_: none.yaml\n", r"a.yaml: _BASE_ names .*none.yaml, which does not exist"),
        ("VERSION: 1\nSOLVER: {MAX_ITERATION: 5}\n", r"a.yaml: unknown key SOLVER.MAX_ITERATION; did you mean"),
        ("VERSION: 9\n", r"a.yaml: VERSION is 9, but this detectron2 reads 1 to 2"),
    ],
    ids=["indent", "bracket", "python object", "words", "empty", "base", "old version", "future version"],
)
def test_a_file_that_is_no_config_is_named_with_the_line(tmp_path, text, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        merge_file(kd_defaults(), str(path))


def test_a_syntax_error_in_a_base_names_the_base(tmp_path):
    (tmp_path / "base.yaml").write_text("SOLVER: {\n")
    (tmp_path / "a.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(UserError, match=r"base.yaml, line 2, column 1"):
        merge_file(kd_defaults(), str(tmp_path / "a.yaml"))


def test_overrides_without_a_value_are_refused():
    with pytest.raises(UserError, match=r"KEY VALUE pairs"):
        merge_list(kd_defaults(), ["SEED"])


def test_a_lazyconfig_is_refused_with_the_tool_that_trains_it():
    with pytest.raises(UserError, match=r"lsj_r101.py is a LazyConfig: tools/lazyconfig_train_net.py trains it"):
        read_config("configs/LazyCOCO/dkd_r18_lsj_r101.py", [])


def test_a_classifiers_config_is_refused_with_the_command_that_trains_it():
    with pytest.raises(UserError, match=r"cls_dkd.yaml is a classifier's config: python -m kd_cls.train trains it"):
        read_config("configs/Digits/cls_dkd.yaml", [])


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"--config-file: there is no file configs/none.yaml"):
        read_config("configs/none.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.WEIGHTS", "pretrained/none.pth"), "MODEL.WEIGHTS: there is no file pretrained/none.pth"),
        (
            ("KD.LOSS.WARMUP_ITERS", 100, "SOLVER.MAX_ITER", 10),
            r"KD.LOSS.WARMUP_ITERS is 100: it must lie in \[0, 10\]",
        ),
        (("SOLVER.ACCUMULATE_STEPS", 0), "^SOLVER.ACCUMULATE_STEPS is 0, expected a whole number ≥ 1\n"),
        (("MODEL.BACKBONE.FREEZE_AT", 2), "random layers would stay frozen"),
    ],
)
def test_what_cannot_train_is_refused_before_training(tiny_cfg, overrides, message):
    assert re.search(message, "\n".join(failures(training_checks(tiny_cfg(*overrides)))))


RETINANET = ("MODEL.META_ARCHITECTURE", "DistilledRetinaNet")
REPEATS = ("DATALOADER.REPEAT_THRESHOLD", 0.1)
ADAMW = ("SOLVER.OPTIMIZER", "stream_adamw")


@pytest.mark.parametrize(
    ("words", "key", "reader", "default"),
    [
        ((*RETINANET, "KD.ROWS", "foreground"), "KD.ROWS is 'foreground'", RETINANET, "'all'"),
        ((*RETINANET, "KD.PROPOSALS", "student+teacher"), "KD.PROPOSALS is 'student+teacher'", RETINANET, "'student'"),
        (("KD.BACKGROUND_WEIGHT", 0.1), "KD.BACKGROUND_WEIGHT is 0.1", ("KD.ROWS", "all"), "0.333"),
        (("KD.DENSE.GAMMA", 2.0), "KD.DENSE.GAMMA is 2.0", ("MODEL.META_ARCHITECTURE", "DistilledRCNN"), "1.0"),
        ((*ADAMW, "SOLVER.STEP", "matched"), "SOLVER.STEP is 'matched'", ADAMW, "'paper'"),
        (("TEST.AUG.ENABLED", True), "TEST.AUG.ENABLED is True", ("the evaluation",), "False"),
        (REPEATS, "DATALOADER.REPEAT_THRESHOLD is 0.1", ("DATALOADER.SAMPLER_TRAIN", "TrainingSampler"), "0.0"),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_what_ignores_it(tiny_cfg, words, key, reader, default):
    cfg = tiny_cfg("KD.LOSS.NAME", "dkd", *words)
    found = "\n".join(failures(training_checks(cfg)))
    assert f"{key}, which {' '.join(reader)} does not read: set it to {default}" in found
    assert key not in "\n".join(failures(training_checks(cfg, resume=True)))  # nothing changes for an old run


@pytest.mark.parametrize(
    "words",
    [
        ("KD.LOSS.NAME", "dkd", "KD.ROWS", "weighted", "KD.BACKGROUND_WEIGHT", 0.1),
        ("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "sgd", "SOLVER.STEP", "matched", "SOLVER.DEEPKD.DELTA_NCG", 0.05),
        ("KD.LOSS.NAME", "none", "KD.DENSE.GAMMA", 2.0, "SOLVER.STEP", "matched"),
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler", *REPEATS),
    ],
    ids=["rows", "optimizer", "baseline", "sampler"],
)
def test_a_key_that_something_reads_and_those_of_distillation_in_a_baseline_are_taken(tiny_cfg, words):
    assert "does not read" not in "\n".join(failures(training_checks(tiny_cfg(*words))))


def test_a_yaml_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("OUTPUT_DIR: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(Exception, match=r"could not determine a constructor"):
        merge_file(kd_defaults(), str(path))


def test_all_keys_lists_dotted_names():
    assert {"KD.LOSS.NAME", "SOLVER.BASE_LR", "KD.TEACHER"} <= set(all_keys(kd_defaults()))


def test_a_warm_up_is_given_in_iterations_or_as_a_share_and_not_as_both():
    cfg = kd_defaults()
    merge_list(cfg, ["KD.LOSS.NAME", "kd", "KD.LOSS.WARMUP_ITERS", "10", "SOLVER.MAX_ITER", "40"])
    assert build_box_loss(cfg).warmup == 0.25
    merge_list(cfg, ["KD.LOSS.WARMUP", "0.5"])
    with pytest.raises(UserError, match=r"KD.LOSS.WARMUP_ITERS 10 and KD.LOSS.WARMUP 0.5 both give the length"):
        build_box_loss(cfg)
    merge_list(cfg, ["KD.LOSS.WARMUP_ITERS", "0"])
    assert build_box_loss(cfg).warmup == 0.5


def test_a_k_that_the_classes_do_not_allow_is_refused_when_the_loss_is_built():
    cfg = kd_defaults()
    merge_list(cfg, ["KD.LOSS.NAME", "gdkd", "KD.LOSS.GDKD.K", "11", "MODEL.ROI_HEADS.NUM_CLASSES", "10"])
    with pytest.raises(UserError, match=r"^KD.LOSS gdkd: k is 11, but it must be below the number of classes, 11"):
        build_box_loss(cfg)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "DistiledRCNN"), r"ARCHITECTURE is 'DistiledRCNN', .* did you mean DistilledRCNN"),
        (("MODEL.BACKBONE.NAME", "build_resnet_fpn"), r"NAME is 'build_resnet_fpn', .* did you mean build_resnet"),
        (("MODEL.BACKBONE.NAME", "mine"), r"NAME is 'mine', which is not registered: import the module that registers"),
        (("MODEL.ROI_HEADS.NAME", "StandardROIHead"), r"ROI_HEADS.NAME is .* did you mean StandardROIHeads"),
        (("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFC"), r"ROI_BOX_HEAD.NAME is .* did you mean FastRCNNConvFCHead"),
        (("MODEL.RPN.HEAD_NAME", "StandardRPN"), r"RPN.HEAD_NAME is .* did you mean StandardRPNHead"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "DefaultAnchors"), r"NAME is .* did you mean DefaultAnchorGenerator"),
        (("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConv"), r"MASK_HEAD.NAME is .* did you mean MaskRCNNConvUpsampleHead"),
        (("MODEL.ROI_KEYPOINT_HEAD.NAME", "KRCNNConvUpsample"), r"KEYPOINT_HEAD.NAME is .* did you mean KRCNN"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "RNP"), r"PROPOSAL_GENERATOR.NAME is 'RNP', .* did you mean RPN"),
        (("SOLVER.MAX_ITER", 0), r"SOLVER.MAX_ITER is 0, expected a whole number ≥ 1"),
        (("SOLVER.BASE_LR", -1.0), r"SOLVER.BASE_LR is -1.0, expected a number ≥ 0"),
        (("KD.LOSS.NAME", "kd", "KD.LOSS.WEIGHT", -1.0), r"LOSS kd: weight must not be below 0, and is -1.0"),
    ],
)
def test_a_value_that_no_training_can_use_is_refused_by_its_key(tiny_cfg, words, message):
    with pytest.raises(UserError, match=message):
        check_before_training(tiny_cfg(*words), resume=False)
