"""The trainer, in this process: resuming, its hooks, and what it says when the numbers break."""

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from helpers.few_digits import few_digits
from kd_core.utils.errors import UserError
from kd_det.checks import check_before_evaluation, failures, training_checks
from kd_det.compat import KEEP_BUFFERS
from kd_det.config.student import student_config
from kd_det.data import register_datasets
from kd_det.engine.trainer import DistillationTrainer
from kd_det.modeling.teacher.build import teacher_config

from .test_stream_trainer import assert_equal_trees

TRAINING = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.WARMUP_ITERS", 3, "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)",
    "SOLVER.BASE_LR", 0.01,
    "SOLVER.CHECKPOINT_PERIOD", 2, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip


def train(cfg, resume=False):
    """The losses of every step and the weights after the last."""
    seed_all_rng(1)  # as detectron2's default_setup does
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    steps = []
    trainer._trainer.model.register_forward_hook(
        lambda _, __, out: steps.append((trainer.iter, {k: v.item() for k, v in out.items()}))
    )
    trainer.train()
    return steps, trainer._trainer.model.state_dict()


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    (tmp_path / "output").mkdir()
    return tiny_cfg(*TRAINING)


def test_a_resumed_run_takes_the_very_steps_of_an_undisturbed_one(cfg, tmp_path):
    steps, weights = train(cfg)
    cfg.OUTPUT_DIR = str(shutil.copytree(tmp_path / "output", tmp_path / "resumed"))
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000001.pth")
    resumed, ours = train(cfg, resume=True)
    assert [i for i, _ in resumed] == [2, 3]
    assert resumed == steps[2:]
    assert all(torch.equal(weights[k], ours[k]) for k in weights)


def test_a_student_with_channels_last_takes_the_same_first_step_and_resumes_to_the_bit(cfg, tmp_path):
    cfg.SOLVER.OPTIMIZER = "deepkd_sgd"
    (_, plain), *_ = train(cfg)[0]
    (tmp_path / "last").mkdir()
    cfg.KD.CHANNELS_LAST, cfg.OUTPUT_DIR = True, str(tmp_path / "last")
    steps, weights = train(cfg)
    assert steps[0][1] == pytest.approx(plain, rel=1e-4)
    layout = DistillationTrainer.build_model(cfg).backbone.fpn_output2.weight
    assert layout.is_contiguous(memory_format=torch.channels_last)
    cfg.OUTPUT_DIR = str(shutil.copytree(tmp_path / "last", tmp_path / "resumed"))
    (tmp_path / "resumed" / "last_checkpoint").write_text("model_0000001.pth")
    resumed, ours = train(cfg, resume=True)
    assert resumed == steps[2:]
    assert_equal_trees(ours, weights)


def test_a_run_killed_before_its_last_file_writes_it_when_it_is_resumed(cfg, tmp_path):
    train(cfg)
    path = tmp_path / "output" / "model_final.pth"
    expected = torch.load(path, weights_only=True)
    path.unlink()
    (tmp_path / "output" / "last_checkpoint").write_text("model_0000003.pth")
    steps, _ = train(cfg, resume=True)
    written = torch.load(path, weights_only=True)
    assert steps == [] and written["iteration"] == expected["iteration"] == 3
    assert_equal_trees(written["model"], expected["model"])
    assert_equal_trees(written["trainer"], expected["trainer"])


def test_a_resume_with_another_length_of_the_schedule_is_refused(cfg):
    train(cfg)
    cfg.SOLVER.MAX_ITER = 12
    with pytest.raises(UserError, match=r"of a training of 4 iterations, but SOLVER.MAX_ITER is 12"):
        DistillationTrainer(cfg).resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LR_SCHEDULER_NAME", "WarmupCosine", "LR_SCHEDULER_NAME WarmupCosine, .*: Unknown LR scheduler: WarmupCosine"),
        ("WARMUP_METHOD", "liner", "WARMUP_METHOD liner: Unknown warmup method: liner"),
        ("STEPS", (3, 2), r"STEPS \(3, 2\), MAX_ITER 4, .*: Milestone must be smaller than start epoch"),
    ],
)
def test_a_schedule_that_cannot_be_built_names_its_keys(cfg, key, value, message):
    cfg.SOLVER[key] = value
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    with pytest.raises(UserError, match=message):
        DistillationTrainer.build_lr_scheduler(cfg, optimizer)


def test_an_evaluation_that_a_kill_interrupted_is_made_up_for(cfg, tmp_path, monkeypatch):
    """The checkpoint of the same iteration is written before it."""
    cfg.TEST.EVAL_PERIOD, cfg.SOLVER.EMA.ENABLED, output = 2, True, tmp_path / "output"
    evaluated = []

    def evaluate(_: object, model: nn.Module) -> dict:
        if not evaluated:
            evaluated.append("killed")
            raise KeyboardInterrupt
        evaluated.append(model.roi_heads.box_predictor.cls_score.bias.clone())
        return {"bbox": {"AP": 10.0 * len(evaluated)}}

    monkeypatch.setattr(DistillationTrainer, "test", staticmethod(evaluate))
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    steps, _ = train(cfg, resume=True)
    assert [iteration for iteration, _ in steps] == [2, 3] and len(evaluated) == 1 + 2 * 2
    of_the_second = torch.load(output / "model_0000001.pth", weights_only=True)["model"]
    assert torch.equal(evaluated[1], of_the_second["roi_heads.box_predictor.cls_score.bias"])
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    assert [line["bbox/AP"] for line in lines if "bbox/AP" in line] == [20.0, 40.0]
    (output / "last_checkpoint").write_text("model_0000001.pth")
    evaluated[1:] = []
    train(cfg, resume=True)
    assert len(evaluated) == 1 + 2 * 2  # the first again: metrics.json says that it was after iteration 2
    lines = (output / "metrics.json").read_text().replace('"iteration": 2', '"iteration": 1')
    (output / "metrics.json").write_text(lines)
    (output / "last_checkpoint").write_text("model_0000001.pth")
    evaluated[1:] = []
    train(cfg, resume=True)
    assert len(evaluated) == 1 + 2  # the first was not interrupted
    text = (output / "metrics.json").read_text()
    (output / "metrics.json").write_text(text.replace('"ema/bbox/AP"', '"other"'))  # trained without an average so far
    (output / "last_checkpoint").write_text("model_0000001.pth")
    evaluated[1:] = []
    train(cfg, resume=True)
    assert len(evaluated) == 1 + 1 + 2  # the average's alone was interrupted


def test_evaluation_alone_needs_weights(cfg):
    with pytest.raises(UserError, match=r"--eval-only: MODEL.WEIGHTS is empty"):
        DistillationTrainer.evaluate_only(cfg)
    with pytest.raises(UserError, match=r"there is no checkpoint in OUTPUT_DIR"):
        DistillationTrainer.evaluate_only(cfg, resume=True)


def test_an_evaluation_refuses_a_name_that_is_not_registered_and_augmentation_that_it_would_not_do(cfg):
    cfg.DATASETS.TEST = ("digits_val",)
    check_before_evaluation(cfg)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(UserError, match=r"TEST.AUG.ENABLED is True, which the evaluation does not read"):
        check_before_evaluation(cfg)
    cfg.MODEL.META_ARCHITECTURE = "DistiledRCNN"
    with pytest.raises(UserError, match=r"'DistiledRCNN', which is not registered: did you mean DistilledRCNN"):
        check_before_evaluation(cfg)


def test_a_test_set_that_could_not_be_evaluated_is_refused_before_the_training(cfg):
    MetadataCatalog.get("digits_val_as_lvis").set(evaluator_type="lvis", thing_classes=["thing"])
    DatasetCatalog.register("digits_val_as_lvis", list)
    cfg.DATASETS.TEST = ("digits_val_as_lvis",)
    try:
        assert any("needs the evaluator 'lvis'" in text for text in failures(training_checks(cfg)))
    finally:
        DatasetCatalog.remove("digits_val_as_lvis")
        MetadataCatalog.pop("digits_val_as_lvis")


def test_an_evaluation_alone_leaves_the_detections_of_the_training_in_its_folder(cfg, tmp_path):
    output, entry = Path(cfg.OUTPUT_DIR), few_digits(tmp_path, 2)
    (output / "inference").mkdir()
    detections = output / "inference" / "coco_instances_results.json"
    detections.write_text("[]")
    (output / "metrics.json").write_text('{"iteration": 3}\n')
    cfg.DATASETS.REGISTER, cfg.DATASETS.TEST = [entry], (entry[0],)
    register_datasets(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": build_model(student_config(cfg)).state_dict()}, cfg.MODEL.WEIGHTS)
    DistillationTrainer.evaluate_only(cfg)
    assert detections.read_text() == "[]" and (output / "evaluation" / detections.relative_to(output)).is_file()


def test_processes_that_see_other_checkpoints_do_not_train_together(cfg, monkeypatch):
    trainer = DistillationTrainer(cfg)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda start: [start, 40])  # of another machine
    with pytest.raises(UserError, match=r"start at the iterations \[0, 40\]: .* that every machine shares"):
        trainer.resume_or_load(resume=True)


def test_a_loader_that_cannot_start_where_a_training_resumes_is_refused(cfg):
    class Trainer(DistillationTrainer):
        @classmethod
        def build_train_loader(cls, cfg):
            return [1, 2]

    with pytest.raises(UserError, match=r"returned a list, which cannot start .*: return kd_det\.data\.loader\."):
        Trainer(cfg)


def test_the_distillation_loss_warms_up_over_its_iterations(cfg):
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER = 0.0, 4
    found = []
    for iterations in (3, 0):
        cfg.KD.LOSS.WARMUP_ITERS = iterations
        found.append([losses["loss_kd_nckd"] for _, losses in train(cfg)[0]])
    shares = [warming / whole for warming, whole in zip(*found, strict=True)]
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_precise_statistics_are_those_of_the_weights_that_are_evaluated(cfg):
    """detectron2's PreciseBN, from a loader of its own: the mean over batches, not a moving average."""
    norms = ("MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0, "TEST.EVAL_PERIOD", 2, "SOLVER.MAX_ITER", 2)
    cfg.merge_from_list([*norms, "SOLVER.STEPS", (1,), "TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3])
    seed_all_rng(1)
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=False)
    student, seen = trainer.checkpointer.model, []
    norm = student.backbone.bottom_up.stem.conv1.norm
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    trainer.train()
    assert len(seen) == 2 + 3  # two iterations, then three batches
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen[2:]]).mean(0))


def test_the_teachers_ap_is_reported_when_asked_for(cfg, tmp_path, caplog):
    entry = few_digits(tmp_path, 3)
    cfg.DATASETS.REGISTER, cfg.DATASETS.TEST = [entry], (entry[0],)
    register_datasets(cfg)
    teacher = yaml.safe_load((tmp_path / "teacher.yaml").read_text())
    teacher["MODEL"]["ROI_HEADS"]["SCORE_THRESH_TEST"] = 0.0  # a random one is sure of nothing
    teacher["INPUT"] = {"MIN_SIZE_TEST": 64}
    (tmp_path / "teacher.yaml").write_text(yaml.safe_dump(teacher))
    cfg.KD.TEACHER.EVALUATE, cfg.SOLVER.MAX_ITER, cfg.INPUT.MIN_SIZE_TEST = True, 1, 64
    trainer = DistillationTrainer(cfg)
    with caplog.at_level(logging.INFO, logger="kd_det"):
        trainer.train()
    assert "Evaluating the teacher" in caplog.text
    reported = json.loads((tmp_path / "output" / "teacher" / "inference" / "coco_instances_results.json").read_text())
    again = teacher_config(cfg)
    again.DATASETS.TEST, again.OUTPUT_DIR = cfg.DATASETS.TEST, str(tmp_path / "again")
    results = trainer.test(again, trainer.checkpointer.model.teacher.model)
    assert results["bbox"]["AP"] >= 0 and reported
    assert reported == json.loads((tmp_path / "again" / "inference" / "coco_instances_results.json").read_text())


def test_the_students_config_has_no_key_that_plain_detectron2_refuses(cfg):
    from detectron2.config import get_cfg

    plain = get_cfg()
    plain.merge_from_other_cfg(student_config(cfg))
    assert plain.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"
    assert plain.MODEL.WEIGHTS.endswith("model_final.pth")
    assert plain.MODEL.FPN.OUT_CHANNELS == cfg.MODEL.FPN.OUT_CHANNELS


def test_processes_keep_buffers_of_their_own_by_the_word_that_this_torch_has(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapped = DistributedDataParallel(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), **KEEP_BUFFERS)
        assert not getattr(wrapped, "forward_sync_buffers", None) and not wrapped.will_sync_module_buffers()
    finally:
        torch.distributed.destroy_process_group()
