"""tools/distill.py from a teacher's two files to an exported student, resumed, and refused where it must be."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

from helpers import forked
from helpers.few_digits import few_digits
from kd_det.engine.distill import build_config, parser, set_neck

ITERATIONS = 3  # detectron2 times iterations from the third on


@pytest.fixture
def teacher(tiny_cfg: Callable, tmp_path: Path) -> list[str]:
    """Config and weights of a tiny detector that was trained for no iterations."""
    cfg = tiny_cfg()
    torch.save(build_model(cfg).state_dict(), tmp_path / "teacher.pth")
    (tmp_path / "teacher.yaml").write_text(cfg.dump())
    return ["--teacher", str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth")]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """A few of the digits, as COCO json files."""
    words = []
    for split, images in (("train", 6), ("val", 2)):
        folder = tmp_path / split
        folder.mkdir()
        _, path, root = few_digits(folder, images, split=f"digits_{split}")
        content = json.loads(Path(path).read_text())
        words += [f"--{split}", path, root]
        assert content["annotations"]
    return words


@pytest.fixture
def line(teacher: list[str], data: list[str], tmp_path: Path) -> Callable[..., list[str]]:
    """`line("--student", …)`: the words of the command on these files, on the CPU."""
    common = ["--output", str(tmp_path / f"out_{tmp_path.name}"), "--iterations", str(ITERATIONS), "--num-gpus", "0"]
    return lambda *words: [*teacher, *data, *common, *map(str, words)]


@pytest.fixture
def command(load_tool: Callable, line: Callable[..., list[str]]) -> Callable[..., None]:
    """`command("--student", …)`: the tool, in this process."""
    tool = load_tool("distill")
    return lambda *words: tool.main(line(*words))


def run(words: list[str]) -> subprocess.CompletedProcess[str]:
    done = forked.run(["tools/distill.py", *words])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done


def test_two_files_become_an_exported_student_and_a_second_call_trains_nothing(line, tmp_path):
    out = tmp_path / f"out_{tmp_path.name}"  # its name is in those of the data sets, which detectron2 keeps
    words = ("--student", "resnet18", "--width", 0.125, "--baseline", "--batch", 2)
    words += ("DATASETS.TEST", f"('{out.name}_val', '{out.name}_train')")  # the first of two is in the table
    words += ("REPORT.ENABLED", True)
    printed = run(line(*words)).stdout
    assert "resnet18 starts from scratch" in printed and f"two trainings of {ITERATIONS} iterations" in printed
    results = json.loads((out / "results.json").read_text())
    assert set(results["results"]) == {"teacher", "student", "baseline"}
    assert results["costs"]["student"]["gflops"] > 0
    assert "KD" not in yaml.safe_load((out / "baseline.yaml").read_text())

    cfg = get_cfg()  # plain detectron2, without this package's keys
    cfg.merge_from_file(str(out / "export" / "student.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    exported = build_model(cfg).eval()
    DetectionCheckpointer(exported).load(str(out / "export" / "student.pth"))
    scripted = torch.jit.load(str(out / "export" / "student.ts"))
    image = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        found = exported.inference([{"image": image}], do_postprocess=False)[0]
        boxes, classes, scores, size = scripted(image)
    assert len(found) > 0 and torch.equal(classes, found.pred_classes) and size.tolist() == [64, 96]
    assert torch.allclose(boxes, found.pred_boxes.tensor, atol=1e-3)
    assert torch.allclose(scores, found.scores, atol=1e-3)

    page = (out / "report.html").read_text()
    assert all(word in page for word in (">teacher<", ">plain<", ">DKD<", "Agreement of teacher and student"))
    assert "not compared" not in page  # logits

    before = (out / "student" / "metrics.json").read_bytes()
    assert printed.index("table: ") < printed.index("student.ts")  # an export that fails does not cost the table
    assert "is finished" in run(line("--resume", "--no-torchscript", *words)).stdout
    written = (out / "distill.yaml").read_text()
    (out / "distill.yaml").write_text(written.replace("SEED: 0", "SEED: 7"))
    edited = forked.run(["tools/distill.py", *line(*words)])
    assert edited.returncode == 1 and "SEED 0, now it is 7" in edited.stderr, edited.stderr[-500:]
    (out / "distill.yaml").write_text(written)
    assert (out / "student" / "metrics.json").read_bytes() == before
    other = forked.run(["tools/distill.py", *line("--student", "resnet34", "--width", 0.125, "--batch", 2)])
    assert other.returncode == 1
    assert "holds another distillation: --student was resnet18, is resnet34" in other.stderr


def test_the_norm_of_the_fpn_suits_the_maps_of_the_backbone_with_its_weights(tiny_cfg, tmp_path):
    cfg, image = tiny_cfg(), tmp_path / "image.png"
    cfg.DATASETS.TRAIN, cfg.INPUT.MIN_SIZE_TEST, cfg.MODEL.WEIGHTS = (str(image),), 64, str(tmp_path / "weights.pth")
    Image.effect_noise((64, 64), 100).convert("RGB").save(image)
    DatasetCatalog.register(str(image), lambda: [{"file_name": str(image)}])
    state = build_model(cfg).state_dict()
    for factor, norm in ((0.001, ""), (1000.0, "GN")):
        state["backbone.bottom_up.stem.conv1.weight"] *= factor
        torch.save(state, cfg.MODEL.WEIGHTS)
        set_neck(cfg)
        assert norm == cfg.MODEL.FPN.NORM


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--student", "resnet1818"), r"did you mean resnet18"),
        (("--student", "resnet18", "--method", "kdd"), r"--method kdd: expected one of"),
        (("--student", "resnet18", "SOLVER.BASE_RL", "1"), r"unknown key SOLVER\.BASE_RL"),
        (("--student", "resnet18", "--student-weights", "gone.pth"), r"there is no file gone\.pth"),
        (("--student", "resnet18", "--num-gpus", "99"), r"--num-gpus 99, but this machine has"),
    ],
)
def test_a_wrong_word_is_told_before_anything_is_trained(command, words, message):
    with pytest.raises(SystemExit, match=message):
        command(*words)


def test_a_wrong_word_may_be_corrected_in_the_same_folder(command, tmp_path):
    with pytest.raises(SystemExit, match="did you mean resnet18"):
        command("--student", "resnet1818")
    with pytest.raises(SystemExit, match=r"SOLVER\.OPTIMIZER is 'deepkdsgd'"):
        command("--student", "resnet18", "SOLVER.OPTIMIZER", "deepkdsgd")
    with pytest.raises(SystemExit, match=r"DATASETS\.TEST is empty"):
        command("--student", "resnet18", "DATASETS.TEST", "()")
    assert not (tmp_path / f"out_{tmp_path.name}" / "distill.yaml").exists()
    with pytest.raises(SystemExit, match="--method kdd"):
        command("--student", "resnet18", "--method", "kdd")


def test_a_teacher_that_cannot_be_built_may_be_corrected_in_the_same_folder(command, teacher, tmp_path):
    torch.save({"backbone.bottom_up.stem.conv1.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(SystemExit, match=r"other\.pth"):
        command("--student", "resnet18", "--teacher", teacher[1], tmp_path / "other.pth")
    assert not (tmp_path / f"out_{tmp_path.name}" / "distill.yaml").exists()
    with pytest.raises(SystemExit, match="--method kdd"):
        command("--student", "resnet18", "--method", "kdd")


def test_a_folder_may_be_called_as_a_data_set_is(teacher, data, tmp_path):
    """The folder names the data sets, and the built-in digits_train must keep its name."""
    words = [*teacher, *data, "--output", str(tmp_path / "digits"), "--num-gpus", "0"]
    args = parser("").parse_intermixed_args([*words, "--student", "resnet18"])
    cfg = build_config(args, tmp_path / "digits")
    assert cfg.DATASETS.TRAIN == ("distill_digits_train",) and cfg.DATASETS.TEST == ("distill_digits_val",)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("teacher.txt", "no config\n", r"teacher\.txt"),
        ("teacher.yaml", "MODEL: [\n", r"teacher\.yaml"),
        ("teacher.yaml", "MODEL:\n  BACKBONES: 3\n", r"unknown key MODEL\.BACKBONES"),
        (
            "teacher.yaml",
            "MODEL:\n  META_ARCHITECTURE: PanopticFPN\n",
            r"teacher\.yaml is a PanopticFPN, and students are derived from detectors only: write the student's config",
        ),
        ("teacher.py", "x = 1\n", r"teacher\.py has no `model`"),
        ("gone.yaml", None, r"gone\.yaml is neither a file nor a name in detectron2's model zoo"),
    ],
)
def test_a_teacher_that_is_no_detector_is_told_in_one_sentence(command, teacher, tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=message) as ended:
        command("--student", "resnet18", "--teacher", tmp_path / name, teacher[2])
    assert "\n" not in ended.value.code


def test_a_one_stage_lazyconfig_is_refused(command, teacher):
    name = "COCO-Detection/retinanet_R_50_FPN_1x.py"
    with pytest.raises(SystemExit, match=r"retinanet_R_50_FPN_1x\.py has no roi_heads, and students of a LazyConfig"):
        command("--student", "resnet18", "--teacher", name, teacher[2])


def test_a_student_that_is_a_lazyconfig_is_shown_the_tool_that_trains_it(command):
    with pytest.raises(SystemExit, match=r"--student my\.py: students .*tools/lazyconfig_train_net\.py") as ended:
        command("--student", "my.py")
    assert "\n" not in ended.value.code


def change_first(name: str, **values: object) -> Callable[[dict], None]:
    """A function that changes the first entry of a list of a COCO json."""
    return lambda content: content[name][0].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content["categories"].append({"id": 99, "name": "x"}), r"knows 10 classes and .* has 11"),
        (lambda content: content.update(annotations=[]), r"\.json has no annotations: there is nothing to learn"),
        (lambda content: content["categories"].append(content["categories"][0]), r"category id used twice \(1\)"),
        (change_first("images", file_name="not_there.jpg"), r"image file missing \(1\): .*not_there\.jpg"),
        (change_first("annotations", category_id=77), r"unknown category \(1\): annotations\[0\], category_id 77"),
        (change_first("annotations", bbox=[9, 9, -4, 5]), r"box of negative size \(1\): annotations\[0\]"),
    ],
)
def test_faulty_data_are_named_before_anything_is_trained(command, data, change, message):
    path = Path(data[1])
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message) as ended:
        command("--student", "resnet18")
    assert "\n" not in ended.value.code


def test_a_truncated_image_is_named_unless_it_is_to_be_skipped(command, data):
    image = Path(data[2], json.loads(Path(data[1]).read_text())["images"][0]["file_name"])
    whole = image.read_bytes()
    copy = Path(data[1]).parent / "images"
    copy.mkdir()
    for other in json.loads(Path(data[1]).read_text())["images"]:
        (copy / other["file_name"]).write_bytes(Path(data[2], other["file_name"]).read_bytes())
    (copy / image.name).write_bytes(whole[: len(whole) // 2])
    words = ["--student", "resnet1818", *data, "--train", data[1], copy]
    with pytest.raises(SystemExit, match=rf"image that cannot be decoded \(1\): {copy / image.name}"):
        command(*words)
    with pytest.raises(SystemExit, match="did you mean resnet18"):  # the data are accepted
        command(*words, "DATASETS.BAD_IMAGES", "skip")
