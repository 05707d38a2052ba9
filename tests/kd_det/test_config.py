"""Configs: unknown keys, wrong types and missing files are named."""

import pytest

from kd_det.checks import check_before_training
from kd_det.config import all_keys, build_box_loss, kd_defaults, merge_file, merge_list
from kd_det.launch import read_config


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
    with pytest.raises(ValueError, match=r"a.yaml: unknown key KD.TEACHER.WEIGHT; did you mean KD.TEACHER.WEIGHTS\?"):
        merge_file(kd_defaults(), str(path))


def test_a_misspelt_key_on_the_command_line_is_named():
    with pytest.raises(ValueError, match=r"the command line: .*KD.LOSS.NAMES"):
        merge_list(kd_defaults(), ["KD.LOSS.NAMES", "dkd"])


def test_a_beta_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"the command line: .*KD.LOSS.DKD.BETA"):
        merge_list(kd_defaults(), ["KD.LOSS.DKD.BETA", "strong"])


def test_overrides_without_a_value_are_refused():
    with pytest.raises(ValueError, match=r"KEY VALUE pairs"):
        merge_list(kd_defaults(), ["SEED"])


def test_a_config_file_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"--config-file: there is no file configs/none.yaml"):
        read_config("configs/none.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.WEIGHTS", "pretrained/none.pth"), "MODEL.WEIGHTS: there is no file pretrained/none.pth"),
        (
            ("KD.LOSS.WARMUP_ITERS", 100, "SOLVER.MAX_ITER", 10),
            r"KD.LOSS.WARMUP_ITERS is 100: it must lie in \[0, 10\]",
        ),
        (("MODEL.BACKBONE.FREEZE_AT", 2), "random layers would stay frozen"),
    ],
)
def test_what_cannot_train_is_refused_before_training(tiny_cfg, overrides, message):
    with pytest.raises(ValueError, match=message):
        check_before_training(tiny_cfg(*overrides), resume=False)


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
    with pytest.raises(ValueError, match=r"KD.LOSS.WARMUP_ITERS 10 and KD.LOSS.WARMUP 0.5 both give the length"):
        build_box_loss(cfg)
    merge_list(cfg, ["KD.LOSS.WARMUP_ITERS", "0"])
    assert build_box_loss(cfg).warmup == 0.5


def test_a_k_that_the_classes_do_not_allow_is_refused_when_the_loss_is_built():
    cfg = kd_defaults()
    merge_list(cfg, ["KD.LOSS.NAME", "gdkd", "KD.LOSS.GDKD.K", "11", "MODEL.ROI_HEADS.NUM_CLASSES", "10"])
    with pytest.raises(ValueError, match="LOSS gdkd: k is 11, but it must be below the number of classes, 11"):
        build_box_loss(cfg)
