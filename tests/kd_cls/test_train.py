"""Runs, what they leave, and the commands."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fvcore.common.config import CfgNode
from timm import create_model
from timm.models import load_checkpoint

from helpers import forked
from helpers.processes import run as run_process
from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.config import load_cfg
from kd_cls.distributed import Process
from kd_cls.engine.cli import run_command
from kd_cls.engine.trainer import Trainer
from kd_cls.evaluate import evaluate_checkpoint
from kd_cls.train import main, train
from kd_core.utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def lines(folder: str | Path) -> list[dict[str, Any]]:
    """metrics.json of a run."""
    return [json.loads(line) for line in Path(folder, "metrics.json").read_text().splitlines()]


def test_a_run_leaves_config_log_metrics_events_last_and_best(tiny: Callable, process: Process) -> None:
    cfg = tiny("KD.LOSS.NAME", "dkd")
    result = train(cfg, process)
    files = {path.name.split(".out.")[0] for path in Path(cfg.OUTPUT_DIR).iterdir()}
    assert files == {"config.yaml", "log.txt", "metrics.json", "run.json", "events", "last.pth", "best.pth"}
    written = lines(cfg.OUTPUT_DIR)
    steps = [line for line in written if "task" in line]
    assert [line["iteration"] for line in steps] == [2, 4, 6, 8]
    for line in steps:
        assert line["loss"] == pytest.approx(line["task"] + line["tckd"] + line["nckd"], rel=1e-4)
    assert [line["iteration"] for line in written if "val/top1" in line] == [4, 8]
    assert result["images"] == 33 and result["best_top1"] >= result["top1"]
    assert "eta" in Path(cfg.OUTPUT_DIR, "log.txt").read_text()
    assert load_cfg(str(Path(cfg.OUTPUT_DIR, "config.yaml"))).KD.LOSS.NAME == "dkd"


def test_a_checkpoint_holds_the_student_alone_and_says_what_it_is(tiny: Callable, process: Process) -> None:
    cfg = tiny("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd")
    train(cfg, process)
    best = torch.load(Path(cfg.OUTPUT_DIR, "best.pth"), weights_only=True)
    assert set(best) == {"model", "metadata"}
    student = create_model("cifar_resnet8", num_classes=10)
    assert list(best["model"]) == list(student.state_dict())
    metadata = best["metadata"]
    assert metadata["method"] == "dkd, deepkd_sgd" and metadata["architecture"] == "cifar_resnet8"
    assert metadata["num_classes"] == 10 and len(metadata["config_hash"]) == 12 and "top1" in metadata["metrics"]
    assert yaml.safe_load(metadata["config"])["KD"]["LOSS"]["NAME"] == "dkd"


def test_plain_timm_loads_a_saved_student_and_it_predicts_the_same(tiny: Callable, process: Process) -> None:
    cfg = tiny("KD.LOSS.NAME", "aekt", "SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5)
    trainer = build_trainer(cfg, process)
    trainer.run()
    model = create_model("cifar_resnet8", num_classes=10).eval()
    images = torch.randn(8, 3, 16, 16)
    for use_ema, student in ((False, trainer.task.trainable_module), (True, trainer.task.trainable_module_ema.module)):
        load_checkpoint(model, str(Path(cfg.OUTPUT_DIR, "last.pth")), use_ema=use_ema)
        assert (student.serialization.weight - torch.eye(10)).abs().max() > 1e-4  # it has learnt
        with torch.no_grad():
            assert (model(images) - student.eval().predict(images)).abs().max() < 1e-5


def test_evaluating_the_checkpoint_gives_the_metrics_of_training(tiny: Callable, process: Process) -> None:
    cfg = tiny()
    result = train(cfg, process)
    cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR, "last.pth"))
    metrics = evaluate_checkpoint(cfg, process)
    assert metrics == {name: result[name] for name in ("loss", "top1", "top5", "images")}


def test_a_distillation_weight_of_0_is_plain_training(run: Callable, tmp_path: Path) -> None:
    plain = run("OUTPUT_DIR", tmp_path / "plain")
    weightless = run("OUTPUT_DIR", tmp_path / "kd", "KD.LOSS.NAME", "dkd", "KD.LOSS.WEIGHT", 0)
    for name, tensor in plain["model"].items():
        assert torch.equal(tensor, weightless["model"][name]), name


def test_sgd_is_torchs_sgd_with_timms_loss(tiny: Callable, process: Process) -> None:
    cfg = tiny("SOLVER.NESTEROV", True)
    trainer = build_trainer(cfg, process)
    reference = build_trainer(cfg, process)
    trainer.run()
    student = reference.task.trainable_module.train()
    sgd = torch.optim.SGD(student.parameters(), 0.02, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(2):
        reference.loaders.train.sampler.set_epoch(epoch)
        reference.loaders.train.dataset.set_epoch(epoch)
        for batch, (images, target) in enumerate(reference.loaders.train):
            sgd.param_groups[0]["lr"] = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * (4 * epoch + batch) / 8)).item())
            sgd.zero_grad()
            torch.nn.functional.cross_entropy(student.predict(images), target).backward()
            sgd.step()
    for (name, ours), theirs in zip(
        trainer.task.trainable_module.named_parameters(), student.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max() < 1e-5, name


def test_seeds_run_in_turn_and_end_in_mean_and_std(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["--config-file", str(tiny_yaml), "OUTPUT_DIR", str(tmp_path), "SEEDS", "[1, 2]", "SOLVER.EPOCHS", "1"]
    summary = main(words)
    values = [lines(tmp_path / f"seed_{seed}")[-1]["val/top1"] for seed in (1, 2)]
    assert summary["top1"]["values"] == pytest.approx(values, rel=1e-4)
    assert summary["top1"]["mean"] == pytest.approx(sum(values) / 2, rel=1e-4)
    assert summary["top1"]["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5, rel=1e-4, abs=1e-9)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert main([*words, "--resume"])["top1"] == summary["top1"]  # both have finished: nothing is trained again


def test_every_seed_has_a_cache_of_its_own_where_images_are_augmented(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["--config-file", str(tiny_yaml), "OUTPUT_DIR", str(tmp_path), "SEEDS", "[1, 2]", "SOLVER.EPOCHS", "1"]
    words += ["KD.LOSS.NAME", "kd", "KD.TEACHER.NAME", "cifar_resnet8", "KD.TEACHER.ALLOW_RANDOM", "True"]
    cache = ["KD.TEACHER.CACHE", "full", "KD.TEACHER.CACHE_DIR", str(tmp_path / "cache")]
    main([*words, *cache, "DATA.AUGMENTATION", "digits"])
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["seed_1", "seed_2"]


def test_a_missing_teacher_is_trained_first_and_only_once(
    tiny: Callable, tiny_yaml: Path, tmp_path: Path, process: Process
) -> None:
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(yaml.safe_dump({"_BASE_": str(tiny_yaml), "OUTPUT_DIR": str(tmp_path / "teacher")}))
    options = ("KD.LOSS.NAME", "kd", "KD.TEACHER.CONFIG_FILE", teacher)
    with pytest.raises(UserError, match=r"has not been trained.*python -m kd_cls.train --config-file .*teacher.yaml"):
        train(tiny(*options), process)
    for wrong in (("KD.LOSS.TEMPERATURE", 0), ("MODEL.NAME", "cifar_resnet9")):  # said before the teacher is trained
        with pytest.raises(UserError, match=r"temperature|cifar_resnet9"):
            train(tiny(*options, "KD.TEACHER.TRAIN_IF_MISSING", True, *wrong), process)
    assert not (tmp_path / "teacher").exists()
    train(tiny(*options, "KD.TEACHER.TRAIN_IF_MISSING", True, "KD.TEACHER.EVALUATE", True), process)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "teacher: top-1" in log
    before = (tmp_path / "teacher" / "last.pth").stat().st_mtime_ns
    train(tiny(*options, "KD.TEACHER.TRAIN_IF_MISSING", True), process)
    assert (tmp_path / "teacher" / "last.pth").stat().st_mtime_ns == before


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tiny: Callable, process: Process) -> None:
    cfg = tiny("KD.LOSS.NAME", "kd", "SOLVER.CHECKPOINT_PERIOD", 1)
    trainer = build_trainer(cfg, process)
    step, weight = trainer.step, trainer.task.trainable_module.model.fc.weight

    def poisoned(*batch: Any) -> None:
        if trainer.iteration == 3:
            weight.data.fill_(float("nan"))
        step(*batch)

    trainer.step = poisoned
    with pytest.raises(FloatingPointError, match=r"not finite at iteration 4: task, tckd, nckd \(learning rate 0\.0"):
        trainer.run()
    last = torch.load(Path(cfg.OUTPUT_DIR, "last.pth"), weights_only=True)
    assert last["training"]["iteration"] == 3
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_seed_below_0_is_drawn_and_noted(tiny: Callable, process: Process) -> None:
    cfg = tiny("SEED", -1, "SOLVER.EPOCHS", 1)
    train(cfg, process)
    seed = load_cfg(str(Path(cfg.OUTPUT_DIR, "config.yaml"))).SEED
    assert seed >= 0
    train(cfg, process, resume=True)
    assert seed == load_cfg(str(Path(cfg.OUTPUT_DIR, "config.yaml"))).SEED


def test_a_start_without_resume_sets_the_weights_of_an_earlier_run_aside(
    tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A `--resume` after a kill before the first checkpoint would take them for this run's."""
    cfg = tiny()
    train(cfg, process)
    output = Path(cfg.OUTPUT_DIR)
    before = (output / "last.pth").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kd_cls.engine.trainer.Trainer.run", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        train(cfg, process)
    assert not (output / "last.pth").exists() and not (output / "best.pth").exists()
    assert (output / "last_earlier.pth").read_bytes() == before and (output / "best_earlier.pth").is_file()
    assert (output / "metrics_earlier.json").is_file()
    assert train(cfg, process, resume=True)["top1"] > 0
    train(cfg, process)
    assert (output / "last_earlier.pth").read_bytes() == before and (output / "last_earlier2.pth").is_file()


@pytest.mark.parametrize("fatal", [4, 8], ids=["of the first epoch", "at the end"])
def test_an_evaluation_that_fails_costs_no_training(
    fatal: int, tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = train(tiny("OUTPUT_DIR", tmp_path / "undisturbed"), process)
    cfg, evaluate = tiny(), Trainer.evaluate

    def fail(trainer: Trainer) -> None:
        if trainer.iteration == fatal:
            raise RuntimeError("a broken image")
        evaluate(trainer)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a broken image"):
        patch.setattr(Trainer, "evaluate", fail)
        train(cfg, process)
    last = torch.load(Path(cfg.OUTPUT_DIR, "last.pth"), weights_only=True)
    assert last["training"]["iteration"] == fatal and last["metadata"]["finished"] is False
    found = train(cfg, process, resume=True)
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    folders = Path(cfg.OUTPUT_DIR), tmp_path / "undisturbed"
    last, undisturbed = (torch.load(folder / "last.pth", weights_only=True) for folder in folders)
    assert last["metadata"]["finished"] is True
    assert all(torch.equal(value, undisturbed["model"][name]) for name, value in last["model"].items())
    values = [
        [(line["iteration"], line["val/top1"]) for text in path.read_text().splitlines() if "val/top1" in text
         for line in [json.loads(text)]]
        for path in (folder / "metrics.json" for folder in folders)
    ]  # fmt: skip
    assert values[0] == values[1] and len(values[0]) == 2


def test_milestones_and_warm_up_hold_to_the_step(tiny: Callable, process: Process) -> None:
    cfg = tiny("SOLVER.SCHEDULE.NAME", "multistep", "SOLVER.SCHEDULE.MILESTONES", "[1, 1.5]", "SOLVER.BASE_LR", 0.1)
    trainer = build_trainer(cfg, process)
    rates = []
    for iteration in range(8):
        rates.append(round(trainer.learning_rate, 8))
        trainer.scheduler.step_update(iteration + 1)
    assert rates == [0.1] * 4 + [0.01] * 2 + [0.001] * 2


def test_a_trial_of_few_epochs_is_told_what_never_comes(
    tiny: Callable, process: Process, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["SOLVER.SCHEDULE.NAME", "multistep", "SOLVER.SCHEDULE.MILESTONES", "[1, 150]"]
    cfg = tiny(*words, "KD.LOSS.NAME", "kd", "KD.LOSS.WARMUP_EPOCHS", 20, "KD.TEACHER.ALLOW_RANDOM", True)
    with caplog.at_level("WARNING", "kd_cls"):
        build_trainer(cfg, process)
    assert "MILESTONES [150] are not reached in SOLVER.EPOCHS 2" in caplog.text
    assert "KD.LOSS.WARMUP_EPOCHS 20 are more than SOLVER.EPOCHS 2" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", "kd_cls"):
        words = ["KD.FEATURE.NAME", "review", "KD.FEATURE.WARMUP_EPOCHS", 20, "KD.LOSS.WARMUP_EPOCHS", 20]
        build_trainer(tiny(*words, "KD.LOSS.NAME", "none", "KD.TEACHER.ALLOW_RANDOM", True), process)
    assert "KD.FEATURE.WARMUP_EPOCHS 20 are more" in caplog.text and "KD.LOSS.WARMUP_EPOCHS" not in caplog.text


def test_a_warm_up_before_the_schedule_leaves_it_the_rest_of_the_epochs(tiny: Callable, process: Process) -> None:
    words = ["SOLVER.SCHEDULE.WARMUP_EPOCHS", 0.5, "SOLVER.SCHEDULE.WARMUP_LR", 0.02, "SOLVER.SCHEDULE.MIN_LR", 0.01]
    trainer = build_trainer(tiny(*words, "SOLVER.BASE_LR", 0.1, "SOLVER.SCHEDULE.WARMUP_PREFIX", True), process)
    rates = []
    for iteration in range(9):
        rates.append(trainer.learning_rate)
        trainer.scheduler.step_update(iteration + 1)
    cosine = [0.01 + 0.045 * (1 + math.cos(math.pi * i / 6)) for i in range(7)]
    assert rates == pytest.approx([0.02, 0.06, *cosine])


def test_the_command_runs_as_a_file_and_as_a_module(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["--config-file", str(tiny_yaml), "SOLVER.EPOCHS", "0.25", "OUTPUT_DIR"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # its first line asks for `python`
    command = [ROOT / "kd_cls" / "train.py", *words, tmp_path / "file"]
    as_file = run_process(command, cwd=tmp_path, env=os.environ | {"PATH": path})
    as_module = forked.run(["-m", "kd_cls.train", *words, tmp_path / "module"], cwd=tmp_path)
    for done, folder in ((as_file, "file"), (as_module, "module")):
        assert done.returncode == 0, done.stderr
        assert "iter 1/1" in done.stdout and (tmp_path / folder / "last.pth").is_file()


def test_bad_input_ends_the_command_with_one_sentence(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--config-file", str(tiny_yaml), "MODEL.NAME", "cifar_resnet9", "OUTPUT_DIR", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["kd_cls/train.py", *words])
    with pytest.raises(SystemExit, match=r"^train.py: MODEL.NAME is 'cifar_resnet9', which timm does not know"):
        run_command(lambda: main(words))


def test_an_unknown_device_is_named(tiny_yaml: Path) -> None:
    with pytest.raises(UserError, match="DEVICE is 'gpu', expected auto, cpu or cuda"):
        main(["--config-file", str(tiny_yaml), "DEVICE", "gpu"])


def test_a_file_in_the_way_and_an_interrupt_end_the_command_with_one_sentence(tiny_yaml: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    words = ["--config-file", str(tiny_yaml), "OUTPUT_DIR", str(tmp_path / "file")]
    with pytest.raises(SystemExit, match=r"[^:]+: .*file: File exists"):
        run_command(lambda: main(words))

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match=r"interrupted; --resume continues from OUTPUT_DIR/last.pth"):
        run_command(interrupted)


def test_the_keys_are_listed_with_their_values(tiny_yaml: Path, capsys: pytest.CaptureFixture) -> None:
    main(["--config-file", str(tiny_yaml), "--list-keys", "KD.LOSS.DKD.BETA", "3"])
    printed = capsys.readouterr().out.splitlines()
    assert {"MODEL.NAME 'cifar_resnet8'", "KD.LOSS.DKD.BETA 3.0", "DATA.RESIDENT False"} <= set(printed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.OPTIMIZER", "sgdd"], r"SOLVER.OPTIMIZER is 'sgdd', expected sgd, dot_sgd"),
        (["SOLVER.IMS_PER_BATCH", 15, "SOLVER.ACCUMULATE_STEPS", 2], r"IMS_PER_BATCH is 15, expected a multiple of 2"),
        (["SOLVER.MIXUP.ALPHA", 0.1, "SOLVER.IMS_PER_BATCH", 15], r"SOLVER.MIXUP mixes pairs.*leaves 15"),
        (["LOG_PERIOD", 0], r"LOG_PERIOD is 0, expected a number ≥ 1"),
        (["SEEDS", "[1, a]"], r"SEEDS is \[1, 'a'\], expected a list of different whole numbers"),
        (["SOLVER.EMA.DECAY", 1], r"SOLVER.EMA.DECAY is 1.0, expected a number in \[0, 1\)"),
        (["KD.TEACHER.CACHE", "half"], r"KD.TEACHER.CACHE is 'half', expected one of none, full, topk"),
        (["SOLVER.DISTRIBUTE_BN", "sum"], r"SOLVER.DISTRIBUTE_BN is 'sum', expected one of reduce, broadcast, empty"),
        (["SOLVER.EPOCHS", 0], r"SOLVER.EPOCHS is 0.0, expected a number above 0"),
        (["SOLVER.SCHEDULE.MILESTONES", "[180, 150, 210]"], r"MILESTONES is \[180, 150, 210\], expected .* order"),
        (["SOLVER.SCHEDULE.WARMUP_EPOCHS", -1], r"SOLVER.SCHEDULE.WARMUP_EPOCHS is -1.0, expected a number ≥ 0"),
        (["SOLVER.SCHEDULE.DECAY_EPOCHS", 0], r"SOLVER.SCHEDULE.DECAY_EPOCHS is 0.0, expected a number above 0"),
        (["SOLVER.SCHEDULE.MIN_LR", -1], r"SOLVER.SCHEDULE.MIN_LR is -1.0, expected a number ≥ 0"),
        (["SOLVER.SCHEDULE.GAMMA", -1], r"SOLVER.SCHEDULE.GAMMA is -1.0, expected a number ≥ 0"),
        (["KD.TEACHER.INPUT_SIZE", -3], r"KD.TEACHER.INPUT_SIZE is -3, expected a number ≥ 0"),
        (["SOLVER.OPTIMIZER", "adahessian"], r"SOLVER.OPTIMIZER is 'adahessian', expected sgd, dot_sgd"),
        (["SOLVER.SCHEDULE.WARMUP_LR", -1], r"SOLVER.SCHEDULE.WARMUP_LR is -1.0, expected a number ≥ 0"),
        (["SOLVER.WEIGHT_DECAY", -1], r"SOLVER.WEIGHT_DECAY is -1.0, expected a number ≥ 0"),
        (["SOLVER.MIXUP.PROB", 2], r"SOLVER.MIXUP.PROB is 2.0, expected a number in \[0, 1\]"),
        (["DATA.VAL_BATCH", -1], r"DATA.VAL_BATCH is -1, expected a number ≥ 0"),
        (["SOLVER.OPTIMIZER", "adamw", "SOLVER.NESTEROV", True], r"SOLVER.NESTEROV is True, .* SOLVER.NESTEROV False"),
        (
            ["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "stream_adamw", "SOLVER.STEP", "matched"],
            r"SOLVER.STEP is 'matched', which only sgd, .* set SOLVER.STEP paper",
        ),
        (
            ["DATA.REPRODUCIBLE", False, "DATA.AUGMENTATION_EPOCHS", 3],
            r"DATA.AUGMENTATION_EPOCHS is 3, but DATA.REPRODUCIBLE False .* set DATA.REPRODUCIBLE True",
        ),
        (["SOLVER.OPTIMIZER", "deepkd_sgd"], r"deepkd_sgd.*KD.LOSS.NAME is none"),
        (["SOLVER.DEEPKD.PRESET", "ours"], r"SOLVER.DEEPKD.PRESET is 'ours', expected paper or released"),
        (
            [
                *["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "deepkd_sgd"],
                *["SOLVER.DEEPKD.PRESET", "released", "SOLVER.STEP", "matched"],
            ],
            r"PRESET released means .* set SOLVER.STEP paper",
        ),
        (
            ["SOLVER.SCHEDULE.WARMUP_PREFIX", True, "SOLVER.SCHEDULE.WARMUP_EPOCHS", 2],
            r"SOLVER.SCHEDULE.WARMUP_EPOCHS is 2.0 and SOLVER.EPOCHS 2.0, which leaves none",
        ),
        (["SEEDS", "[1, 1]"], r"SEEDS is \[1, 1\], expected a list of different whole numbers"),
        (
            ["SOLVER.SCHEDULE.NAME", "wsd", "SOLVER.EPOCHS", 2],
            r"SOLVER.SCHEDULE wsd of SOLVER.EPOCHS 2 with DECAY_EPOCHS 30, .*: wsd schedule requires",
        ),
        (["SOLVER.SCHEDULE.NAME", "onecycle"], r"SOLVER.SCHEDULE.NAME is 'onecycle', expected one of multistep"),
        (["SOLVER.AMP.DTYPE", "float8"], r"SOLVER.AMP.DTYPE is 'float8'"),
        (["DATA.NAME", "digit"], r"DATA.NAME 'digit' is unknown: choose one of"),
        (["DATA.TRAIN_IMAGES", 100000], r"DATA.TRAIN_IMAGES is 100000, expected 0 \(all\) … 1198"),
        (["DATA.AUGMENTATION", "blur"], r"unknown augmentation 'blur'"),
        (["MODEL.STD", "[1, 0, 1]"], r"MODEL.STD is \[1, 0, 1\], expected numbers above 0"),
        (["MODEL.MEAN", "[0.5]"], r"MODEL.MEAN is \[0.5\], expected three numbers"),
        (["MODEL.KWARGS", "{depths: 3}"], r"MODEL.KWARGS is .* refuses"),
        (["MODEL.KWARGS", "[1]"], r"MODEL.KWARGS is '\[1\]', expected a yaml mapping"),
        (["MODEL.WEIGHTS", "gone.pth"], r"MODEL.WEIGHTS: there is no file gone.pth"),
        (["KD.LOSS.NAME", "dkdd"], r"KD.LOSS.NAME is 'dkdd', but the losses are: none, aekt"),
        (["KD.LOSS.NAME", "kd", "KD.LOSS.TEMPERATURE", 0], r"KD.LOSS kd: .*temperature"),
        (["KD.LOSS.NAME", "gdkd", "KD.LOSS.GDKD.K", 10], r"KD.LOSS gdkd: .*k"),
        (["KD.LOSS.NAME", "gdkds"], r"gdkds is a mix for foreground and background"),
        (["KD.LOSS.NAME", "dkd", "SOLVER.MIXUP.ALPHA", 0.2], r"SOLVER.MIXUP mixes the labels.*'dkd'.* gdkd3, dist, kd"),
        *(
            (["KD.LOSS.NAME", "kd", "SOLVER.MIXUP.ALPHA", 0.2, *streams], r"SOLVER.MIXUP mixes the labels.*'kd'")
            for streams in (["SOLVER.OPTIMIZER", "stream_adamw"], ["SOLVER.MOMENTA", "auto"])
        ),
        (
            ["KD.LOSS.NAME", "gdkd", "KD.LOSS.TOPK.ENABLED", True],
            r"KD.LOSS gdkd: .* no non-target term .*KD.LOSS.TOPK.ENABLED False",
        ),
        (["KD.LOSS.NAME", "kd", "DATA.VIEWS", 2], r"KD.LOSS.NAME 'kd' compares 1 view.* take DATA.VIEWS 1"),
        (["KD.LOSS.NAME", "kd", "KD.LOSS.WARMUP", 0.1, "KD.LOSS.WARMUP_EPOCHS", 1], r"set one of them"),
        (
            ["KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.DEEPKD.DELTA_TOG", 0.2],
            r"SOLVER.OPTIMIZER deepkd_sgd, MOMENTUM .*DEEPKD .*: .*tog",
        ),
        (
            ["DATA.AUGMENTATION", "imagenet", "DATA.TIMM_OPTIONS", "{re_prob: 0.25}"],
            r"DATA.TIMM_OPTIONS has unknown options \['re_prob'\]",
        ),
        (["DATA.NAME", "imagenet", "DATA.ROOT", "/nowhere"], r"/nowhere.*DATA.ROOT"),
        (["MODEL.PRETRAINED", True], r"MODEL.PRETRAINED: timm has no weights for cifar_resnet8"),
        (["DEVICE", "cuda"], r"DEVICE is 'cuda'"),
    ],
)
def test_bad_input_is_named_before_training_starts(
    tiny: Callable, process: Process, options: list, message: str
) -> None:
    if options[0] == "DEVICE" and torch.cuda.is_available():
        options, message = ["DEVICE", "tpu"], "tpu"
    cfg: CfgNode = tiny(*options)
    with pytest.raises(UserError, match=message):
        main(["--config-file", write(cfg)])


def test_an_optimizer_whose_steps_are_random_trains_in_one_process(tiny: Callable) -> None:
    cfg, device = tiny("SOLVER.OPTIMIZER", "kron"), torch.device("cpu")
    check_config(cfg, Process(device))
    with pytest.raises(UserError, match=r"SOLVER.OPTIMIZER kron draws random numbers .* 2 processes"):
        check_config(cfg, Process(device, world_size=2))


def test_wandb_is_asked_for_only_when_it_is_wanted(
    tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"WANDB.ENABLED is True, but the wandb package is not installed: pip"):
        train(tiny("WANDB.ENABLED", True), process)
    train(tiny("SOLVER.EPOCHS", 0.25), process)


def test_wandb_gets_the_metrics(tiny: Callable, process: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        """wandb's module and its run, as far as they are used."""

        def __init__(self) -> None:
            self.started: dict[str, Any] = {}
            self.steps: list[int] = []

        def init(self, **options: Any) -> "Recorder":
            self.started = options
            return self

        def log(self, metrics: dict[str, Any], step: int) -> None:
            assert all(isinstance(value, int | float) for value in metrics.values())
            self.steps.append(step)

        def finish(self) -> None:
            self.steps.append(-1)

    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    train(tiny("WANDB.ENABLED", True), process)
    assert recorder.started["config"]["MODEL"]["NAME"] == "cifar_resnet8" and recorder.started["resume"] == "allow"
    assert recorder.steps == [2, 4, 4, 6, 8, 8, -1]


def write(cfg: CfgNode) -> str:
    """A config as a file."""
    path = Path(cfg.OUTPUT_DIR).parent / "given.yaml"
    path.write_text(cfg.dump())
    return str(path)
