"""The scalars of the streams, and the best checkpoint."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model

from helpers.tiny_detector import TINY_PANOPTIC, TINY_SEGMENTOR, make_batch, make_labelled_batch
from kd_det.config.student import student_config
from kd_det.engine.hooks.checkpointing import KeepBest, main_figure
from kd_det.engine.hooks.monitoring import admitted_classes, measured_gsnr
from kd_det.engine.train_step import build_step
from kd_det.engine.trainer import DistillationTrainer
from kd_det.solver import build_optimizer

TRAINING = (
    "KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0, "KD.LOSS.TOPK.ENABLED", True, "SOLVER.OPTIMIZER", "deepkd_sgd",
    "SOLVER.AMP.ENABLED", True, "SOLVER.BASE_LR", 0.001, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 20, "SEED", 1,
    "DATASETS.TRAIN", "('digits_train',)", "DATASETS.TEST", "()", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "DATALOADER.NUM_WORKERS", 0,
)  # fmt: skip


@pytest.fixture
def trainer(tiny_cfg, tmp_path):
    (tmp_path / "output").mkdir()
    return DistillationTrainer(tiny_cfg(*TRAINING))


def test_norms_momenta_k_and_scale_are_written_every_twenty_iterations(trainer, tmp_path):
    trainer.train()
    (line,) = map(json.loads, (tmp_path / "output" / "metrics.json").read_text().splitlines())
    assert line["grad_norm/tog+ncg"] > 0 and line["grad_norm/tcg"] > 0
    assert line["momentum/tog"] == pytest.approx(0.975) and line["momentum/tcg"] == pytest.approx(0.825)
    assert line["topk/K"] == 10  # 19 of 20 iterations: all of the ten non-target classes but for the ramp's end
    assert line["loss_scale"] >= 1


@pytest.mark.parametrize("tiny", [TINY_SEGMENTOR, TINY_PANOPTIC], ids=["segmentor", "panoptic"])
def test_k_is_of_the_eleven_classes_of_a_segmentors_pixels_and_of_a_panoptic_models_boxes(tiny_cfg, storage, tiny):
    cfg = tiny_cfg(*(word for pair in tiny.items() for word in pair), *TRAINING)
    Path(cfg.KD.TEACHER.CONFIG_FILE).write_text(student_config(cfg).dump())
    model = build_model(cfg).train()
    assert admitted_classes(model) == {}  # nothing has been distilled
    storage.iter = 19  # the ramp's end
    model(make_labelled_batch(classes=tiny["MODEL.SEM_SEG_HEAD.NUM_CLASSES"]))
    assert admitted_classes(model) == {"topk/K": 10}


def test_the_gsnr_is_told_while_it_is_measured(tiny_cfg, tiny_model, storage):
    auto = ("SOLVER.MOMENTA", "auto", "SOLVER.GSNR.PERIOD", 1, "SOLVER.GSNR.WINDOW", 3)
    cfg, model = tiny_cfg(*TRAINING, "SOLVER.AMP.ENABLED", False, *auto), tiny_model(*TRAINING)
    step = build_step(cfg, model, [make_batch(seed=i) for i in range(4)], build_optimizer(cfg, model))
    told = []
    for step.iter in range(4):
        step.run_step()
        told.append(measured_gsnr(step))
    assert told[0] == {} == told[3]  # one sample says nothing; after the window the momenta are set
    assert set(told[1]) == {"gsnr/tog", "gsnr/tcg", "gsnr/ncg"}
    assert told[2] == {f"gsnr/{stream}": value for stream, value in step.auto_momenta.measured.items()}
    assert measured_gsnr(SimpleTrainer(model, [], step.optimizer)) == {}


def test_the_best_of_several_data_sets_is_that_of_the_first():
    nested = {"first": {"bbox": {"AP": 3.0}}, "second": {"bbox": {"AP": 5.0}}, "ema": {"first": {"bbox": {"AP": 4.0}}}}
    assert main_figure(nested) == 3.0 and main_figure(nested["ema"]) == 4.0
    assert main_figure({"bbox": {"AP": 1.0}}) == 1.0
    assert math.isnan(main_figure({})) and math.isnan(main_figure({"segm": {"AP": 1.0}}))
    assert main_figure({"sem_seg": {"mIoU": 2.0}, "panoptic_seg": {"PQ": 1.0}}) == 1.0


def test_the_best_weights_are_kept_and_a_resumed_run_knows_how_good_they_were(trainer, tmp_path):
    path = tmp_path / "output" / "model_best.pth"
    hook = KeepBest(path, trainer.checkpointer.model)
    hook.trainer = trainer
    hook.before_train()
    kept = []
    for trainer.iter, ap in enumerate([1.0, float("nan"), 3.0, 2.0]):
        trainer._last_eval_results = {"bbox": {"AP": ap}}
        hook.after_step()
        hook.after_step()  # no new evaluation
        kept.append(torch.load(path, weights_only=True)["iteration"])
    assert kept == [0, 0, 2, 2]
    assert not (tmp_path / "output" / "last_checkpoint").exists()
    trainer.start_iter = 3
    resumed = KeepBest(path, trainer.checkpointer.model)
    resumed.trainer = trainer
    resumed.before_train()
    assert resumed.best == 3.0
