"""A year-old checkpoint's worth of trouble: each is one clear error or one clear warning."""

import logging
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.utils.env import seed_all_rng

from kd_core.utils.errors import UserError
from kd_det.checkpoint.resume import IGNORED_ON_RESUME, check_resumable
from kd_det.config import all_keys, kd_defaults, merge_file, read_config
from kd_det.engine.launch import argument_parser, setup
from kd_det.engine.trainer import DistillationTrainer

TRAINING = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.005,
    "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 1,
    "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip


@pytest.fixture(scope="module")
def old_output(tmp_path_factory):
    """OUTPUT_DIR of a training, filled by the first test that needs it."""
    return tmp_path_factory.mktemp("old")


@pytest.fixture
def old(tiny_cfg, tmp_path, old_output):
    """`old("KEY", value, …)`: a config beside whose checkpoints there are those of a training of two iterations."""

    def build(*overrides):
        return tiny_cfg(*TRAINING, *overrides)

    if not (old_output / "last_checkpoint").exists():
        cfg = build("OUTPUT_DIR", old_output)
        seed_all_rng(1)
        DistillationTrainer(cfg).train()
        (old_output / "config.yaml").write_text(cfg.dump())
    shutil.copytree(old_output, tmp_path / "output")
    return build


def resume(cfg):
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=True)
    return trainer


def change(path, **changes):
    """Rewrite a checkpoint; a key whose new value is None goes away."""
    state = torch.load(path, weights_only=True) | changes
    torch.save({key: value for key, value in state.items() if value is not None}, path)
    return path


def test_the_checkpoint_is_fine_as_it_is(old, caplog):
    with caplog.at_level(logging.WARNING, logger="kd_det"):
        assert resume(old()).start_iter == 2
    assert "resume" not in caplog.text


def test_a_truncated_checkpoint_is_named_with_those_beside_it(old, tmp_path):
    path = tmp_path / "output" / "model_final.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(
        ValueError,
        match=r"model_final.pth cannot be read as a checkpoint: it is truncated, .*; "
        r"beside it are model_0000000.pth, model_0000001.pth: write one's name into last_checkpoint",
    ):
        resume(old())
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000000.pth")
    assert resume(old()).start_iter == 1


def test_a_last_checkpoint_that_is_not_there_is_named(old, tmp_path):
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000007.pth")
    with pytest.raises(
        ValueError, match=r"there is no file .*model_0000007.pth, which last_checkpoint names; beside it"
    ):
        resume(old())
    for path in (tmp_path / "output").glob("model_*.pth"):
        path.unlink()
    with pytest.raises(UserError, match=r"there is no other checkpoint beside it: train anew, without --resume"):
        resume(old())


@pytest.mark.parametrize("name", ["sgd", "dot_sgd", "stream_adamw"])
def test_the_optimizer_of_another_method_is_refused(old, name):
    with pytest.raises(UserError, match=rf"SOLVER.OPTIMIZER deepkd_sgd, but this config says {name}: resume with the"):
        resume(old("SOLVER.OPTIMIZER", name))


def test_an_optimizer_of_other_parameters_is_refused(old, tmp_path):
    state = torch.load(tmp_path / "output" / "model_final.pth", weights_only=True)
    state["trainer"]["_trainer"]["optimizer"]["param_groups"].pop()
    torch.save(state, tmp_path / "output" / "model_final.pth")
    with pytest.raises(
        ValueError, match=r"--resume: the optimizer's state in .*model_final.pth does not fit: .* groups"
    ):
        resume(old())


def test_settings_that_the_checkpoint_overrules_are_said(old, caplog):
    with caplog.at_level(logging.WARNING, logger="kd_det"):
        trainer = resume(old("SOLVER.DEEPKD.DELTA_NCG", 0.05, "SOLVER.BASE_LR", 0.01))
    assert "keeps the checkpoint's initial_lr 0.005, not the config's 0.01" in caplog.text
    assert re.search(r"checkpoint's momenta \{.*'ncg': 0.975\}, not the config's \{.*'ncg': 0.95", caplog.text)
    assert trainer.optimizer.param_groups[0]["momenta"]["ncg"] == 0.975


def test_a_checkpoint_of_detectron2s_own_trainer_has_no_optimizer_to_go_on_with(old, tmp_path):
    change(tmp_path / "output" / "model_final.pth", trainer={"iteration": 1, "optimizer_name": "deepkd_sgd"})
    with pytest.raises(UserError, match=r"holds no optimizer: it was written by detectron2 0.5's own trainer"):
        resume(old())


def test_weights_alone_are_no_training_to_resume(old, tmp_path):
    change(tmp_path / "output" / "model_final.pth", trainer=None)
    with pytest.raises(UserError, match=r"model_final.pth holds weights, but no training \(key trainer\)"):
        resume(old())


def test_a_checkpoint_of_another_student_is_not_resumed(old):
    with pytest.raises(
        ValueError, match=r"is of another model: \d+ weights .* is roi_heads.box_head.fc1.weight; that would mix"
    ):
        resume(old("MODEL.ROI_BOX_HEAD.FC_DIM", 8))


def test_another_run_is_not_resumed(old, tmp_path):
    (tmp_path / "output" / "config.yaml").write_text(old().dump())  # whose teacher.yaml is this test's
    for key, value in (("KD.LOSS.NAME", "gdkd"), ("SOLVER.MAX_ITER", 3), ("KD.TEACHER.WEIGHTS", "a.pth"), ("SEED", 2)):
        with pytest.raises(UserError, match=rf"was started with {key} .*, now it is '?{value}'?; that would mix two"):
            check_resumable(old(key, value))
    with pytest.raises(UserError, match=r"KD.LOSS.NAME 'dkd', now it is 'kd' \(and 1 more keys differ\)"):
        check_resumable(old("KD.LOSS.NAME", "kd", "SOLVER.BASE_LR", 1.0))
    (tmp_path / "output" / "last_checkpoint").unlink()  # nothing was trained yet
    check_resumable(old("KD.LOSS.NAME", "kd"))


def test_where_files_are_how_fast_it_goes_and_how_it_is_evaluated_may_change(old, tmp_path):
    (tmp_path / "output" / "config.yaml").write_text(old().dump())
    check_resumable(
        old(
            "TEST.EVAL_PERIOD", 7, "DATASETS.TEST", "('digits_val',)", "SOLVER.CHECKPOINT_PERIOD", 9, "VIS_PERIOD", 1,
            "KD.COMPILE", True, "KD.TEACHER.FOLD_BN", False, "MODEL.WEIGHTS", "a.pth", "DATALOADER.NUM_WORKERS", 3,
            "DATASETS.REGISTER", [["mine", "a.json", "images"]], "WANDB.ENABLED", True,
            "DATASETS.REGISTER_SEM_SEG", [["maps", "images", "labels", "classes.txt"]],
        )
    )  # fmt: skip


def test_every_key_that_may_differ_on_resume_exists():
    assert set(IGNORED_ON_RESUME) <= set(all_keys(kd_defaults()))


def test_a_config_saved_by_another_version_is_compared_key_by_key(old, tmp_path):
    path = tmp_path / "output" / "config.yaml"
    cfg = old()
    saved = yaml.safe_load(path.read_text())
    del saved["SOLVER"]["EMA"], saved["WANDB"]  # keys that an older version did not have
    saved["KD"]["TEACHER"] |= {"FREEZE": True, "CONFIG_FILE": cfg.KD.TEACHER.CONFIG_FILE}
    path.write_text(yaml.safe_dump(saved))
    check_resumable(cfg)
    cfg.SOLVER.EMA.ENABLED = True
    with pytest.raises(UserError, match=r"SOLVER.EMA.ENABLED False, now it is True"):
        check_resumable(cfg)
    path.unlink()
    check_resumable(cfg)


def test_a_config_file_with_a_key_of_another_version_is_refused_by_name(old, tmp_path):
    path = tmp_path / "old.yaml"
    path.write_text("KD:\n  TEACHER:\n    FREEZE: True\n")
    with pytest.raises(UserError, match=r"KD.TEACHER.FREEZE"):
        merge_file(kd_defaults(), str(path))


def start(cfg, weights):
    cfg.MODEL.WEIGHTS = str(weights)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    return trainer


def save(folder, state):
    torch.save({"model": state}, folder / "given.pth")
    return folder / "given.pth"


def test_weights_of_another_library_are_refused_with_their_keys(old, tmp_path):
    foreign = {f"layer{i}.conv.weight": torch.zeros(3, 3) for i in range(4)}
    with pytest.raises(
        ValueError, match=r"has not one of the student's \d+ weights; its keys are layer0.conv.weight, "
    ):
        start(old(), save(tmp_path, foreign))


def test_a_teachers_file_given_as_the_students_is_refused_or_named(old, tiny_model, tmp_path, caplog):
    wider = tiny_model("MODEL.RESNETS.RES2_OUT_CHANNELS", 16).state_dict()
    with pytest.raises(
        ValueError,
        match=r"MODEL.WEIGHTS: .*given.pth is of another backbone: .* a teacher's file is KD.TEACHER.WEIGHTS",
    ):
        start(old(), save(tmp_path, wider))
    deeper = tiny_model("MODEL.RESNETS.DEPTH", 101).state_dict()  # has every weight of a ResNet-50
    with caplog.at_level(logging.WARNING, logger="kd_det"):
        start(old(), save(tmp_path, deeper))
    assert (
        "weights of a backbone that the student has no place for, the first is backbone.bottom_up.res4." in caplog.text
    )
    assert "Is it the teacher's file?" in caplog.text


def test_a_student_that_starts_as_its_own_teacher_is_noted(old, tiny_model, tmp_path, caplog):
    path = save(tmp_path, tiny_model().state_dict())
    with caplog.at_level(logging.WARNING, logger="kd_det"):
        start(old("KD.TEACHER.WEIGHTS", path), path)
    assert "given.pth is the teacher's file, too: the student starts as it" in caplog.text


def test_heads_of_another_number_of_classes_are_a_start(old, tiny_model, tmp_path):
    other = tiny_model("MODEL.ROI_HEADS.NUM_CLASSES", 3).state_dict()
    trainer = start(old(), save(tmp_path, other))
    name = "backbone.fpn_output2.weight"
    assert torch.equal(trainer.checkpointer.model.state_dict()[name], other[name])


def test_a_truncated_start_is_named_with_its_key(old, tmp_path):
    path = save(tmp_path, {"weight": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"MODEL.WEIGHTS: .*given.pth cannot be read as a checkpoint: it is truncated"
    ):
        start(old(), path)


def test_an_evaluation_and_a_refused_resume_leave_the_trainings_config_alone(tiny_cfg, tmp_path):
    output = tmp_path / "output"
    cfg = tiny_cfg("DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "('digits_val',)", "SOLVER.MAX_ITER", 4)
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "mine.yaml"), "--num-gpus", "0"]
    parser = argument_parser("")
    setup(parser.parse_args(words))
    written = (output / "config.yaml").read_text()
    assert "MAX_ITER: 4" in written
    setup(parser.parse_args([*words, "--eval-only", "SOLVER.MAX_ITER", "9"]))
    assert (output / "config.yaml").read_text() == written
    (output / "last_checkpoint").write_text("model_0000001.pth")
    with pytest.raises(UserError, match=r"SOLVER.MAX_ITER 4, now it is 9"):
        setup(parser.parse_args([*words, "--resume", "SOLVER.MAX_ITER", "9"]))
    assert (output / "config.yaml").read_text() == written


def test_a_start_without_resume_forgets_the_last_checkpoint_of_an_earlier_run_in_its_folder(tiny_cfg, tmp_path):
    cfg, last = tiny_cfg("DATASETS.TRAIN", "('digits_train',)"), tmp_path / "output" / "last_checkpoint"
    (tmp_path / "mine.yaml").write_text(cfg.dump())
    words = ["--config-file", str(tmp_path / "mine.yaml"), "--num-gpus", "0", "DATASETS.TEST", "('digits_val',)"]
    last.parent.mkdir()
    last.write_text("model_0000001.pth")
    best = last.with_name("model_best.pth")
    best.write_text("its best")
    for kept in (["--eval-only"], ["--resume"]):
        setup(argument_parser("").parse_args([*kept, *words]))
        assert last.exists() and best.exists()
    setup(argument_parser("").parse_args(words))
    assert not last.exists() and not best.exists()
    assert best.with_name("model_best_earlier.pth").read_text() == "its best"


def test_a_config_that_a_kill_has_cut_off_is_named_and_does_not_stop_a_resume(tiny_cfg, tmp_path, caplog):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000001.pth")
    for content in ("", "MODEL: [", "just words"):
        (tmp_path / "output" / "config.yaml").write_text(content)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="kd_det"):
            check_resumable(tiny_cfg())
        assert "config.yaml cannot be read" in caplog.text


@pytest.mark.skipif("KD_UPSTREAM" in os.environ, reason="detectron2's main has another default decay of biases")
def test_a_config_written_by_the_first_version_still_resumes(tmp_path):
    written = Path(__file__).parents[2] / "golden" / "config_96e214b_detection.yaml"  # of configs/Digits/deepkd.yaml
    shutil.copy(written, tmp_path / "config.yaml")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    words = ["OUTPUT_DIR", str(tmp_path)]
    check_resumable(read_config("configs/Digits/deepkd.yaml", words))
    with pytest.raises(UserError, match=r"started with KD.LOSS.NAME 'dkd', now it is 'gdkd'"):
        check_resumable(read_config("configs/Digits/deepkd.yaml", [*words, "KD.LOSS.NAME", "gdkd"]))
    read_config(str(written), [])  # every key is still there
