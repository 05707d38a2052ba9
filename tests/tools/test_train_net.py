"""tools/train_net.py as its users run it: processes, real data, killed and resumed."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import forked
from helpers.processes import run as run_process
from kd_det.engine.launch import argument_parser, run_command

ROOT = Path(__file__).resolve().parents[2]
TRAIN_NET = [str(ROOT / "tools" / "train_net.py")]
SMALL = [
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "6",
    "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.STEPS", "(5,)",
    "DATALOADER.NUM_WORKERS", "1", "SEED", "1", "DATASETS.TEST", "()",
]  # fmt: skip
RANDOM_TEACHER = ["KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]


def command(output, *options, config="configs/Digits/dkd.yaml"):
    return [
        *TRAIN_NET,
        "--config-file",
        config,
        "--num-gpus",
        "0",
        *options[: 1 if "--resume" in options else 0],
        *SMALL,
        "OUTPUT_DIR",
        str(output),
        *RANDOM_TEACHER,
        *[o for o in options if o != "--resume"],
    ]


def run(args):
    done = forked.run(args)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """OUTPUT_DIR of six iterations of DKD on the built-in digits."""
    output = tmp_path_factory.mktemp("undisturbed")
    run(command(output))
    return output


def load(path):
    return torch.load(path, weights_only=True)


def equal(a, b):
    """Whether two nested states are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def test_killed_and_resumed_it_ends_where_an_undisturbed_run_does_to_the_bit(undisturbed, tmp_path):
    with forked.started_command(command(tmp_path), tmp_path / "said") as process:
        while not (tmp_path / "last_checkpoint").exists():
            assert process.exitcode is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "model_final.pth").exists()
    run(command(tmp_path, "--resume"))
    expected, got = load(undisturbed / "model_final.pth"), load(tmp_path / "model_final.pth")
    assert equal(expected["model"], got["model"])
    assert equal(expected["trainer"], got["trainer"])  # optimizer, schedules, iteration
    first, second = metrics(undisturbed)[-1], metrics(tmp_path)[-1]
    assert first.keys() == second.keys()  # the losses there are medians over the iterations of one process
    assert (first["iteration"], first["lr"]) == (second["iteration"], second["lr"]) == (5, pytest.approx(second["lr"]))


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def test_the_output_folder_holds_config_log_metrics_events_and_checkpoints(undisturbed):
    names = {path.name.split(".tfevents")[0].split("events.out")[0] or "events" for path in undisturbed.iterdir()}
    assert {
        "config.yaml",
        "student.yaml",
        "log.txt",
        "metrics.json",
        "model_0000002.pth",
        "model_final.pth",
        "last_checkpoint",
    } <= names
    assert any("tfevents" in path.name for path in undisturbed.iterdir())
    assert "eta:" in (undisturbed / "log.txt").read_text()
    assert {"loss_kd_tckd", "loss_kd_nckd", "total_loss", "lr", "time"} <= set(metrics(undisturbed)[-1])


PLAIN = """
import json, sys, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1] + "/student.yaml")
cfg.MODEL.WEIGHTS = sys.argv[1] + "/model_final.pth"
model = build_model(cfg).eval()
weights = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"]
missing = model.load_state_dict(weights, strict=True)
DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
image = torch.arange(3 * 96 * 96).remainder(251).view(3, 96, 96).to(torch.uint8)
with torch.no_grad():
    found = model([{"image": image, "height": 96, "width": 96}])[0]["instances"]
assert not any(name.startswith("kd_") for name in sys.modules)
print(json.dumps([type(model).__name__, found.pred_boxes.tensor.tolist(), found.scores.tolist(),
found.pred_classes.tolist()]))
"""


def test_plain_detectron2_loads_the_student_and_detects_the_same(undisturbed):
    from detectron2.modeling import build_model

    from kd_det.engine.launch import read_config

    path = os.environ.get("PYTHONPATH", "") if "KD_UPSTREAM" in os.environ else ""  # of upstream's detectron2
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = run_process([sys.executable, "-c", PLAIN, undisturbed], env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    name, boxes, scores, classes = json.loads(done.stdout.splitlines()[-1])
    cfg = read_config(str(undisturbed / "config.yaml"), [])
    ours = build_model(cfg).eval()
    ours.load_state_dict(load(undisturbed / "model_final.pth")["model"], strict=True)
    image = torch.arange(3 * 96 * 96).remainder(251).view(3, 96, 96).to(torch.uint8)
    with torch.no_grad():
        found = ours([{"image": image, "height": 96, "width": 96}])[0]["instances"]
    assert name == "GeneralizedRCNN" and type(ours).__name__ == "DistilledRCNN"
    assert len(boxes) == len(found) > 0
    assert torch.allclose(torch.tensor(boxes), found.pred_boxes.tensor, atol=1e-4)
    assert torch.allclose(torch.tensor(scores), found.scores, atol=1e-6) and classes == found.pred_classes.tolist()


def test_the_checkpoint_holds_the_student_and_no_teacher(undisturbed):
    state = load(undisturbed / "model_final.pth")
    assert set(state) == {"model", "trainer", "iteration"}
    assert not any("teacher" in key for key in state["model"])


def test_a_loss_that_is_not_finite_names_iteration_and_terms_and_keeps_the_last_checkpoint(tmp_path):
    # One step of a learning rate that no weight survives: iterations 0 to 4 are fine, the checkpoint of 2 is whole.
    options = [
        "SOLVER.BASE_LR",
        "1e30",
        "SOLVER.WARMUP_FACTOR",
        "0.0",
        "SOLVER.WARMUP_METHOD",
        "constant",
        "SOLVER.WARMUP_ITERS",
        "4",
        "SOLVER.CLIP_GRADIENTS.ENABLED",
        "False",
    ]
    done = forked.run(command(tmp_path, *options))
    assert done.returncode != 0
    assert "train_net: Training stopped at iteration " in done.stderr and "Traceback" not in done.stderr
    assert "Terms of the iteration before" in done.stderr and "--resume" not in done.stderr
    assert f"with another OUTPUT_DIR and MODEL.WEIGHTS {tmp_path / 'model_0000002.pth'}" in done.stderr
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    assert all(torch.isfinite(v.float()).all() for v in load(tmp_path / "model_0000002.pth")["model"].values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["KD.LOSS.DKD.BTEA", "8"], "the command line: unknown key KD.LOSS.DKD.BTEA; did you mean KD.LOSS.DKD.BETA?"),
        (["KD.LOSS.DKD.BETA", "strong"], "KD.LOSS.DKD.BETA is 'strong', expected a number such as 0.25"),
        (["DATASETS.TRAIN", "('coco_2017_train',)", "MODEL.ROI_HEADS.NUM_CLASSES", "80"], "DETECTRON2_DATASETS"),
        (
            ["KD.TEACHER.CONFIG_FILE", "no/teacher.yaml"],
            "KD.TEACHER.CONFIG_FILE: no/teacher.yaml is neither a file nor a name",
        ),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "random layers would stay frozen"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "does not distil"),
    ],
    ids=["unknown key", "beta", "data set", "teacher config", "frozen stem", "meta architecture"],
)
def test_bad_input_is_one_clear_error_before_training(load_tool, monkeypatch, tmp_path, options, message):
    monkeypatch.chdir(ROOT)
    arguments = argument_parser("").parse_args(command(tmp_path, *options)[len(TRAIN_NET) :])
    with pytest.raises(SystemExit) as ended:
        run_command("train_net", load_tool("train_net").main, arguments)
    assert ended.value.code.startswith("train_net: ") and message in ended.value.code and "\n" not in ended.value.code
    assert not list(tmp_path.glob("model_*.pth"))


def test_bad_input_ends_the_process_in_one_line_and_exit_code_1(tmp_path):
    done = forked.run(command(tmp_path, "KD.LOSS.DKD.BTEA", "8"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("train_net: the command line: unknown key KD.LOSS.DKD.BTEA")


def test_the_help_names_the_ways_to_start_and_the_keys_are_listed_with_their_values(load_tool, capsys):
    text = run([*TRAIN_NET, "--help"]).stdout
    for part in ("torchrun --nproc-per-node", "--num-gpus 0", "--list-keys", "--resume", "working folder"):
        assert part in text
    words = ["--config-file", str(ROOT / "configs/Digits/dkd.yaml"), "--list-keys", "KD.LOSS.DKD"]
    load_tool("train_net").main(argument_parser("").parse_args(words))
    assert capsys.readouterr().out.splitlines() == [
        "KD.LOSS.DKD.ALPHA 1.0", "KD.LOSS.DKD.BETA 0.25", "KD.LOSS.DKD.PARTITION 'target'",
    ]  # fmt: skip


def test_several_machines_without_gpus_are_refused_with_the_right_command(load_tool):
    arguments = argument_parser("").parse_args(["--num-machines", "2", "--num-gpus", "0"])
    with pytest.raises(SystemExit, match=r"would run 2 separate trainings: .*torchrun --nnodes 2"):
        run_command("train_net", load_tool("train_net").main, arguments)


def test_real_coco_images_train_and_evaluate(shared_dir, tmp_path):
    coco, images = shared_dir / "data" / "coco-mini", tmp_path / "datasets" / "coco"
    (images / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (images / split).symlink_to(coco / split)
        few_images(coco / "annotations" / f"instances_{split}.json", images / "annotations", 8)
    base = [*TRAIN_NET, "--config-file", "configs/COCO/dkd_r18_r101.yaml", "--num-gpus", "0"]
    options = [
        "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TRAIN", "128",
        "INPUT.MAX_SIZE_TEST", "128", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32", "DATALOADER.NUM_WORKERS", "1",
        "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
        "OUTPUT_DIR", str(tmp_path / "output"), *RANDOM_TEACHER,
    ]  # fmt: skip
    training = [
        "SOLVER.MAX_ITER", "3", "SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SEED", "0", "MODEL.WEIGHTS", "",
        "MODEL.BACKBONE.FREEZE_AT", "0", "DATASETS.TEST", "()", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False",
    ]  # fmt: skip
    # A process that imports everything itself, and looks for the data meanwhile.
    variables = os.environ | {"OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(images.parent)}
    done = run_process([sys.executable, *base, *options, *training], cwd=ROOT, env=variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    entries = metrics(tmp_path / "output")
    assert entries[-1]["iteration"] == 2 and entries[-1]["loss_kd_nckd"] > 0
    weights = str(tmp_path / "output" / "model_final.pth")
    no_teacher = ["KD.TEACHER.CONFIG_FILE", "no/such.yaml", "MODEL.WEIGHTS", weights]
    json_file = str(images / "annotations" / "instances_val2017.json")
    entry = ["mini_val", json_file, str(images / "val2017")]
    val = ["DATASETS.REGISTER", str([entry]), "DATASETS.TEST", f"('{entry[0]}',)"]
    done = run([*base, "--eval-only", *options, *no_teacher, *val])
    assert "Evaluation results for bbox" in done.stdout + done.stderr


def few_images(annotations, folder, count):
    """Write the first images of a COCO json, with their objects, into a folder."""
    content = json.loads(annotations.read_text())
    content["images"] = content["images"][:count]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (folder / annotations.name).write_text(json.dumps(content))
