"""The moving average of the student: its recursion, evaluated and saved beside the student, resumed to the bit."""

import json
import logging

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng

from helpers.few_digits import few_digits
from kd_core.utils.errors import UserError
from kd_det.config.student import student_config
from kd_det.data import register_datasets
from kd_det.engine.hooks.moving_average import MovingAverage
from kd_det.engine.trainer import DistillationTrainer
from kd_det.solver import check_solver

TRAINING = (
    "KD.LOSS.NAME", "aekt", "KD.LOSS.TEMPERATURE", 1.0, "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.BASE_LR", 0.01,
    "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.75, "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64,
    "DATASETS.TRAIN", "('digits_train',)", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)",
    "SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "DATALOADER.NUM_WORKERS", 0, "SEED", 1,
)  # fmt: skip


@pytest.fixture
def cfg(tiny_cfg, tmp_path):
    (tmp_path / "output").mkdir()
    entry = few_digits(tmp_path, 4)
    cfg = tiny_cfg(*TRAINING, "DATASETS.TEST", f"('{entry[0]}',)")
    cfg.DATASETS.REGISTER = [entry]
    register_datasets(cfg)
    return cfg


def prepared(cfg, resume=False):
    seed_all_rng(1)  # as detectron2's default_setup does
    trainer = DistillationTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    return trainer


def test_it_follows_the_student_is_evaluated_beside_it_and_resumes_to_the_bit(cfg, tmp_path):
    trainer = prepared(cfg)
    student, output = trainer.checkpointer.model, tmp_path / "output"
    expected = {}
    step = trainer._trainer.run_step

    def step_and_average():
        step()
        for name, value in student.state_dict().items():
            first = trainer.iter == 0 or not value.is_floating_point()
            expected[name] = value.clone() if first else 0.75 * expected[name] + 0.25 * value

    trainer._trainer.run_step = step_and_average
    results = trainer.train()
    assert set(results) == {"bbox", "ema"} and results["ema"]["bbox"]["AP"] >= 0
    (line,) = [json.loads(text) for text in (output / "metrics.json").read_text().splitlines() if "ema" in text]
    assert line["ema/bbox/AP"] == results["ema"]["bbox"]["AP"] and line["bbox/AP"] == results["bbox"]["AP"]

    saved = torch.load(output / "model_final.pth", weights_only=True)
    assert saved["ema"].keys() == saved["model"].keys() == expected.keys()
    for name, value in student.state_dict().items():
        assert torch.equal(saved["model"][name], value)
        torch.testing.assert_close(saved["ema"][name], expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(saved["ema"]["backbone.fpn_output2.weight"], saved["model"]["backbone.fpn_output2.weight"])
    plain = build_model(student_config(cfg))
    assert type(plain).__name__ == "GeneralizedRCNN"
    plain.load_state_dict(saved["ema"], strict=True)

    best = torch.load(output / "model_best_ema.pth", weights_only=True)
    assert best["AP"] == results["ema"]["bbox"]["AP"]
    assert all(torch.equal(best["model"][name], value) for name, value in saved["ema"].items())

    (output / "last_checkpoint").write_text("model_0000001.pth")
    resumed = prepared(cfg, resume=True)
    resumed.train()
    again = torch.load(output / "model_final.pth", weights_only=True)
    assert all(torch.equal(saved[key][name], again[key][name]) for key in ("model", "ema") for name in saved[key])


def test_a_checkpoint_without_it_is_continued_with_a_warning_and_one_of_another_student_is_refused(cfg, caplog):
    trainer = prepared(cfg)
    trainer.start_iter = 2
    with caplog.at_level(logging.WARNING):
        next(hook for hook in trainer._hooks if type(hook).__name__ == "UpdateAverage").before_train()
    assert "the checkpoint to resume has no moving average (key ema): it starts from" in caplog.text
    state = {**trainer.average.state_dict(), "roi_heads.box_head.fc1.weight": torch.zeros(2, 2)}
    with pytest.raises(UserError, match=r"\(key ema\) .* 1 weights .*, the first is roi_heads.box_head.fc1"):
        trainer.average.load_state_dict(state)


def test_building_it_costs_the_student_no_random_number(cfg):
    model = build_model(cfg)
    before = torch.get_rng_state()
    average = MovingAverage(cfg, model, lambda: DistillationTrainer.build_plain_model(cfg))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in average.state_dict().items())
    cfg.SOLVER.EMA.DECAY = 1.0
    with pytest.raises(UserError, match=r"SOLVER.EMA.DECAY is 1.0, expected a number in \[0, 1\)"):
        check_solver(cfg)
