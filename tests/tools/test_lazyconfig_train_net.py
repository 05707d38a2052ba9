"""tools/lazyconfig_train_net.py: a LazyConfig student of a LazyConfig teacher is killed, resumed, evaluated, loaded."""

import json
import math
import os
import runpy
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import GeneralizedRCNN

from helpers.few_digits import few_digits
from helpers.lazy_training import TINY, arguments, in_a_process, register, train, train_and_die
from helpers.processes import run
from helpers.report_runs import Page
from kd_core.utils.errors import UserError
from kd_det.config.lazy import engine_config, in_lazy_words, name_of, write_lazy_student
from kd_det.engine.lazy_trainer import LazyTrainer, main, refuse_random_frozen, setup
from kd_det.export import read_config
from kd_det.modeling.backbone import timm_bottom_up
from kd_det.modeling.teacher.lazy import load_lazy

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.name for path in (ROOT / "configs" / "LazyCOCO").glob("*_*.py"))


def train_in_a_process(output: Path, entry: list[str], *words: str) -> None:
    done = in_a_process(train, output, entry, *words)
    assert done == 0, (output / "log.txt").read_text()[-3000:]


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four digits images, as an entry of DATASETS.REGISTER."""
    return few_digits(tmp_path_factory.mktemp("data"), 4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, entry: list[str]) -> Path:
    """The output folder of six iterations."""
    output = tmp_path_factory.mktemp("lazy")
    train_in_a_process(output, entry)
    return output


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_killed_and_resumed_it_ends_where_an_undisturbed_run_does_to_the_bit(trained, entry, tmp_path):
    assert in_a_process(train_and_die, tmp_path, entry) == -signal.SIGKILL
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    train_in_a_process(tmp_path, entry, "--resume")
    expected, got = load(trained / "model_final.pth"), load(tmp_path / "model_final.pth")
    assert expected.keys() == got.keys() >= {"model", "trainer", "ema"}
    assert all(equal(expected[key], got[key]) for key in ("model", "ema", "trainer"))


def test_it_logs_the_distillation_terms_and_steps_them_in_streams_of_their_own(trained):
    last = json.loads((trained / "metrics.json").read_text().splitlines()[0])
    assert "method    DeepKD (DKD)" in (trained / "log.txt").read_text()
    assert last["iteration"] == 5 and {"loss_kd_tckd", "loss_kd_nckd", "loss_cls", "lr"} <= set(last)
    state = load(trained / "model_final.pth")["trainer"]
    assert state["optimizer_name"] == "kd_core.optim.presets.deepkd_sgd"
    assert state["_trainer"]["optimizer"]["param_groups"][0]["momenta"] == pytest.approx(
        {"tog": 0.975, "tcg": 0.825, "ncg": 0.975}
    )


PLAIN = """
import sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
model = instantiate(LazyConfig.load(sys.argv[1] + "/student.yaml").model)
model.load_state_dict(torch.load(sys.argv[1] + "/model_final.pth", weights_only=True)["model"], strict=True)
DetectionCheckpointer(model).load(sys.argv[1] + "/model_final.pth")
assert not any(name.startswith("kd_") for name in sys.modules)
print(type(model).__name__)
"""


def test_plain_detectron2_builds_and_loads_the_student(trained):
    python_path = os.pathsep.join(p for p in os.getenv("PYTHONPATH", "").split(os.pathsep) if Path(p).resolve() != ROOT)
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    done = run([sys.executable, "-c", PLAIN, trained], env=variables, cwd=trained)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "GeneralizedRCNN"


def test_evaluation_alone_gives_the_ap_that_the_training_ended_with_and_a_report(trained, entry, tmp_path, load_tool):
    words = ["--eval-only", register(entry), f"train.init_checkpoint={trained}/model_final.pth"]
    results = main(arguments(tmp_path / "output", *words))
    logged = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert results["bbox"]["AP"] == logged[-1]["bbox/AP"] and "ema/bbox/AP" in logged[-1]
    load_tool("report").write_report([trained, tmp_path / "output"], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert page.rows[0] == ["", f"DeepKD (DKD) [{trained.name}]", "DeepKD (DKD) [output]"]
    for folder in (trained, tmp_path / "output"):
        assert {value for value, _ in page.numbers["bbox/AP", str(folder)]} == {results["bbox"]["AP"]}
    assert f"output is an evaluation of {trained}/model_final.pth" in page.text


def test_accumulated_micro_batches_amp_clipping_and_torchs_optimizers_are_taken(tmp_path):
    words = ["accumulate_steps=2", "amp.enabled=True", "amp.dtype=bfloat16", "clip.max_norm=1"]
    lazy = load_lazy(TINY, ["optimizer._target_=torch.optim.AdamW", *(f"train.{word}" for word in words)])
    lazy.train.output_dir = str(tmp_path)
    lazy.optimizer.pop("momentum")
    cfg = engine_config(lazy)
    cfg.MODEL.DEVICE = "cpu"
    trainer = LazyTrainer.of(lazy)(cfg)
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert len(trainer._trainer.micro_batches) == 2 and trainer._trainer.train_step.dtype is torch.bfloat16
    assert trainer._trainer.train_step.clip.args[1] == 1 and trainer.loader.batches.batch_size == 1


def test_a_folder_of_digits_is_a_word_and_a_detector_may_normalise_by_itself():
    lazy = load_lazy(TINY)
    lazy.train.output_dir = "20240101"
    del lazy.model.pixel_mean
    assert engine_config(lazy).OUTPUT_DIR == "20240101"


def test_resuming_with_another_loss_or_teacher_is_refused_with_the_key_named(trained):
    with pytest.raises(UserError, match=r"--resume: .* started with model\.loss\.beta 0\.25, now it is 1"):
        setup(arguments(trained, "--resume", "model.loss.beta=1"))
    with pytest.raises(UserError, match=r"model\.teacher\.overrides \['.*fc_dims.*'\], now it is \[\]"):
        setup(arguments(trained, "--resume", "model.teacher.overrides=[]"))
    with pytest.raises(UserError, match=r"train\.clip\.max_norm None, now it is 1"):
        setup(arguments(trained, "--resume", "train.clip.max_norm=1"))


def test_a_cut_config_is_not_compared_and_a_name_of_a_shipped_config_is_found(trained, entry, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "output")
    written = tmp_path / "output" / "config.yaml"
    written.write_text(written.read_text()[:1000] + "\n  ]")
    setup(arguments(tmp_path / "output", "--resume", register(entry)))
    given = arguments(tmp_path / "new", config="LazyDigits/lsj_r50.py")
    monkeypatch.chdir(tmp_path)
    setup(given)
    assert Path(given.config_file).samefile(ROOT / "configs" / "LazyDigits" / "lsj_r50.py")


def test_a_function_or_an_object_has_the_same_name_in_every_process():
    class Layer:
        pass

    assert name_of(partial(torch.nn.Conv2d, Layer, norm=math.sqrt, bias=False)).endswith(
        "Layer, norm=math.sqrt, bias=False)"
    )
    assert name_of(Layer()) == name_of(Layer()) and " at 0x" not in name_of(Layer())


def test_frozen_layers_of_a_timm_network_may_come_with_weights_of_its_own(tmp_path):
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "weights.pth")
    options = {"name": "mobilenetv3_small_050", "freeze_at": 2}
    refuse_random_frozen(timm_bottom_up(**options, weights=str(tmp_path / "weights.pth")), "")
    with pytest.raises(UserError, match="they would stay random"):
        refuse_random_frozen(timm_bottom_up(**options), "")


def test_a_start_without_resume_forgets_the_last_checkpoint_of_an_earlier_run_in_its_folder(entry, tmp_path):
    last, found = tmp_path / "last_checkpoint", tmp_path / "inference" / "coco_instances_results.json"
    last.write_text("model_0000001.pth")
    found.parent.mkdir()
    found.write_text("[]")
    for kept in ("--eval-only", "--resume"):
        setup(arguments(tmp_path, kept, register(entry)))
        assert last.exists() and found.exists()
    setup(arguments(tmp_path, register(entry)))
    assert not last.exists() and not found.exists() and (found.parent / "coco_instances_results_earlier.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config-file=no.py"], "lazyconfig_train_net: --config-file: no.py is neither a file"),
        (["nonsense"], "lazyconfig_train_net: the command line: nonsense"),
        (["model.backbone.depth=3"], "lazyconfig_train_net: --config-file: its `model` cannot be built (TypeError"),
        (["train.max_iter=many"], "lazyconfig_train_net: the LazyConfig: train.max_iter is 'many', expected a whole"),
        (["train.accumulate_steps=4"], "lazyconfig_train_net: dataloader.train.total_batch_size 2 must be a positive"),
        (["train.accumulate_steps=0"], "lazyconfig_train_net: train.accumulate_steps is 0, expected a whole number"),
        (["train.amp.dtype=bf16"], "lazyconfig_train_net: train.amp.dtype is 'bf16', expected float16 or bfloat16"),
        (["train.checkpointer.max_to_keep=0"], "lazyconfig_train_net: train.checkpointer.max_to_keep is 0, expected"),
        (["train.checkpointer.period=0"], "lazyconfig_train_net: train.checkpointer.period is 0, expected a whole"),
        (["train.ema.decay=2"], "lazyconfig_train_net: train.ema.decay is 2.0, expected a number in [0, 1)"),
        (["model.roi_heads.num_classes=7"], "lazyconfig_train_net: dataloader.train.dataset.names: digits_train has"),
        (["train.init_checkpoint=no.pth"], "lazyconfig_train_net: train.init_checkpoint: there is no file no.pth"),
        (["model.teacher.allow_random=False"], "lazyconfig_train_net: model.teacher.weights is empty: name the"),
        (["model.backbone.bottom_up.freeze_at=2"], "lazyconfig_train_net: train.init_checkpoint is empty and "),
        (["lr_multiplier.warmup_lenght=0.1"], "lazyconfig_train_net: lr_multiplier cannot be built (TypeError"),
        (["dataloader.train.mapper.foo=1"], "lazyconfig_train_net: dataloader.train.mapper cannot be built (TypeError"),
        (["dataloader.evaluator.foo=1"], "lazyconfig_train_net: dataloader.evaluator cannot be built (TypeError"),
        (["train.bad_images=stop"], "lazyconfig_train_net: train.bad_images is 'stop': expected error or skip"),
        (["dataloader.train.shuffle=True"], "lazyconfig_train_net: dataloader.train.shuffle is not read"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    tool = ROOT / "tools" / "lazyconfig_train_net.py"
    line = ["--config-file", TINY, "--num-gpus", "0", *sorted(words, key=lambda w: w[0] != "-")]
    monkeypatch.setattr(sys, "argv", [str(tool), *line, f"train.output_dir={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(tool), run_name="__main__")
    assert ended.value.code.startswith(message) and "\n" not in ended.value.code


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configs_of_the_folder_build_their_students_and_write_them_for_detectron2(name, tmp_path):
    lazy = load_lazy(str(ROOT / "configs" / "LazyCOCO" / name))
    if "pretrained" in lazy.model.backbone.bottom_up:
        lazy.model.backbone.bottom_up.pretrained = False
    cfg = engine_config(lazy)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (180000, 8) and "coco" in cfg.DATASETS.TRAIN[0]
    assert f"output/coco/{name[:-3]}" == cfg.OUTPUT_DIR
    student = instantiate(lazy.model)
    assert student.loss is not None and student.teacher is not None and student.max_iter == 180000
    write_lazy_student(lazy, tmp_path / "student.yaml")
    plain = instantiate(LazyConfig.load(str(tmp_path / "student.yaml")).model)
    assert type(plain) is GeneralizedRCNN
    shapes = [{k: v.shape for k, v in model.state_dict().items()} for model in (plain, student)]
    assert shapes[0] == shapes[1]
    with pytest.raises(UserError, match=r"student.yaml is of a LazyConfig: plain detectron2 builds its model"):
        read_config(str(tmp_path / "student.yaml"))


def test_the_engines_keys_are_said_by_their_lazy_names():
    message = in_lazy_words("SOLVER.EMA.DECAY and SOLVER.MAX_ITER; resume from OUTPUT_DIR")
    assert message == "train.ema.decay and train.max_iter; resume from train.output_dir"
