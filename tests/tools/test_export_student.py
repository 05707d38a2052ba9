"""What is exported detects what the student detects, and needs nothing of this project."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

from kd_core.utils.errors import UserError
from kd_det.export import adapter, check_equal, read_config, read_student

FIRST = "backbone.fpn_lateral2.weight"
PLAIN = """
import json, sys
sys.modules["kd_det"] = sys.modules["kd_core"] = None  # importing them is an ImportError
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
import torch
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1] + "/student.yaml")
predictor = DefaultPredictor(cfg)
predictor.model.load_state_dict(torch.load(cfg.MODEL.WEIGHTS, weights_only=True)["model"])  # strictly
image = torch.arange(3 * 64 * 96).remainder(251).view(64, 96, 3).to(torch.uint8).numpy()
found = predictor(image)["instances"]
print(json.dumps([found.scores.tolist(), found.pred_classes.tolist()]))
traced = torch.jit.load(sys.argv[1] + "/student.ts")
boxes, classes, scores, size = traced(torch.as_tensor(image).permute(2, 0, 1))
print(json.dumps([scores.tolist(), classes.tolist()]))
"""


@pytest.fixture
def export_student(load_tool):
    return load_tool("export_student")


@pytest.fixture
def run(tiny_cfg, save_run) -> Path:
    return save_run(tiny_cfg("KD.LOSS.NAME", "aekt", "KD.TEACHER.ALLOW_RANDOM", True, "INPUT.MIN_SIZE_TEST", 64))


def test_plain_detectron2_and_plain_torch_detect_what_the_student_does(run, tmp_path, export_student, capsys):
    output = tmp_path / "exported"
    export_student.main([str(run), "--output", str(output), "--torchscript"])
    assert sorted(path.name for path in output.iterdir()) == ["student.pth", "student.ts", "student.yaml"]
    assert "student.ts: image → pred_boxes, pred_classes, scores, image_size" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-c", PLAIN, str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    by_predictor, by_trace = map(json.loads, done.stdout.splitlines()[-2:])

    ours = build_model(read_config(str(run / "config.yaml"))).eval()
    ours.load_state_dict(torch.load(run / "model_final.pth", weights_only=True)["model"])
    image = torch.arange(3 * 64 * 96).remainder(251).view(64, 96, 3).to(torch.uint8)
    with torch.no_grad():
        expected = ours.inference([{"image": image.permute(2, 0, 1)}], do_postprocess=False)[0]
    assert len(expected) > 5
    for scores, classes in (by_predictor, by_trace):
        assert scores == pytest.approx(expected.scores.tolist(), abs=1e-5)
        assert classes == expected.pred_classes.tolist()


def test_the_last_checkpoint_is_taken_and_not_the_end_of_an_earlier_run_in_the_same_folder(run, tmp_path):
    state = torch.load(run / "model_final.pth", weights_only=True)
    changed = {name: value + 1 if value.is_floating_point() else value for name, value in state["model"].items()}
    torch.save(state | {"model": changed}, run / "model_0000004.pth")
    assert read_student(run).source == run / "model_final.pth"
    (run / "last_checkpoint").write_text("model_0000004.pth")
    assert read_student(run).source == run / "model_0000004.pth"


def test_a_checkpoint_of_another_name_and_the_moving_average_are_taken(run, tmp_path, export_student):
    state = torch.load(run / "model_final.pth", weights_only=True)
    state["ema"] = {name: value + 1 if value.is_floating_point() else value for name, value in state["model"].items()}
    torch.save(state, run / "model_0000049.pth")
    (run / "model_final.pth").unlink()
    (run / "last_checkpoint").write_text("model_0000049.pth")
    name = "roi_heads.box_predictor.cls_score.bias"
    export_student.main([str(run), "--output", str(tmp_path / "a")])
    export_student.main([str(run / "model_0000049.pth"), "--output", str(tmp_path / "b"), "--average"])
    plain, average = (torch.load(tmp_path / x / "student.pth", weights_only=True)["model"][name] for x in "ab")
    assert torch.equal(plain, state["model"][name]) and torch.equal(average, state["ema"][name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "model_final.pth").unlink(), r"run holds none of model_final.pth"),
        (lambda run: [(run / f"{n}.yaml").unlink() for n in ("student", "config")], r"no student.yaml or config.yaml"),
        (lambda run: spoil(run, lambda model: model.popitem()), r"pth lacks 1 weights .* \S+$"),
        (lambda run: spoil(run, lambda model: model.update(foreign=torch.ones(1))), r"has 1 weights that .* foreign$"),
        (lambda run: spoil(run, lambda model: model.update({FIRST: torch.ones(1)})), rf"another shape, .* {FIRST}"),
        (lambda run: (run / "model_final.pth").write_bytes(b"half"), r"cannot be read as a checkpoint"),
    ],
    ids=["no weights", "no config", "missing", "foreign", "shape", "damaged"],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(run, tmp_path, export_student, change, message):
    change(run)
    with pytest.raises(SystemExit, match=f"^export_student: .*{message}"):
        export_student.main([str(run), "--output", str(tmp_path / "exported")])
    assert not (tmp_path / "exported").exists()


def spoil(run: Path, change) -> None:
    state = torch.load(run / "model_final.pth", weights_only=True)
    change(state["model"])
    torch.save(state, run / "model_final.pth")


def test_without_the_average_or_a_tracing_adapter_it_says_so(run, tmp_path, export_student, monkeypatch):
    with pytest.raises(UserError, match=r"holds no moving average: it was trained without SOLVER.EMA.ENABLED"):
        read_student(run, average=True)
    monkeypatch.setitem(sys.modules, "detectron2.export", None)  # as v0.5's own, which imports caffe2
    with pytest.raises(SystemExit, match=r"need detectron2.export.TracingAdapter, and detectron2 .* cannot import it"):
        export_student.main([str(run), "--output", str(tmp_path / "exported"), "--torchscript"])
    assert (tmp_path / "exported" / "student.pth").is_file() and not (tmp_path / "exported" / "student.ts").exists()


def test_onnx_is_written_where_torch_can_and_refused_by_name_elsewhere(run, tmp_path, export_student, capsys):
    output = tmp_path / "exported"
    try:
        import onnx
    except ImportError:
        with pytest.raises(SystemExit, match=r"^export_student: ONNX: torch .* the package onnx: pip install onnx"):
            export_student.main([str(run), "--output", str(output), "--onnx"])
        assert not (output / "student.onnx").exists()
    else:
        export_student.main([str(run), "--output", str(output), "--onnx"])
        onnx.checker.check_model(str(output / "student.onnx"))
        assert "student.onnx: image → pred_boxes, pred_classes, scores, image_size" in capsys.readouterr().out


def test_an_export_that_detects_other_things_is_refused(run):
    traceable = adapter(read_student(run))
    check_equal("it", traceable, traceable)
    for change in (
        lambda boxes, classes, scores, size: (boxes, classes, scores + 0.01, size),
        lambda boxes, classes, scores, size: (boxes[1:], classes[1:], scores[1:], size),
        lambda boxes, classes, scores, size: (boxes, classes, scores, size + 1),
        lambda boxes, classes, scores, size: (boxes.flip(0), classes, scores, size),
    ):
        with pytest.raises(RuntimeError, match="it gives other detections than the student"):
            check_equal("it", traceable, lambda image, change=change: change(*traceable(image)), share=0.9)


def test_the_help_teaches(export_student, capsys):
    with pytest.raises(SystemExit):
        export_student.main(["--help"])
    text = capsys.readouterr().out
    for part in ("DefaultPredictor(cfg)(image)", "torch.jit.load", "INPUT.FORMAT", "onnxruntime"):
        assert part in text
