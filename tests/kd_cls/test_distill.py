"""`python -m kd_cls.distill`: from a teacher's name to a table, resumed, and refused where it must be."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import kd_cls.models  # noqa: F401  (registers cifar_<name>)
from kd_cls import distill, evaluate
from kd_cls.config import load_cfg
from kd_cls.data.statistics import InputStats
from kd_cls.data.transforms import build_transforms
from kd_cls.engine.derive import METHODS, Request, derive_student, without_teacher
from kd_cls.engine.forecast import training_seconds
from kd_cls.engine.trainer import Trainer
from kd_core.losses.feature_config import distils
from kd_core.utils.errors import UserError

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three classes that any network can tell apart."""
    root, generator = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                noise = generator.integers(-30, 30, (20, 16, 3))
                image = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def teacher_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a teacher of 100 other classes."""
    torch.manual_seed(0)  # made before the test is seeded
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(timm.create_model("cifar_resnet14").state_dict(), path)
    return path


@pytest.fixture
def command(colours: Path, teacher_weights: Path, tmp_path: Path) -> Callable[..., None]:
    """`command("--student", …)`: the command on the colours, on the CPU; later words win."""

    def run(*words: object) -> None:
        common = ["--teacher", "cifar_resnet14", "--teacher-weights", teacher_weights, "--student", "cifar_resnet8"]
        common += ["--data", colours, "--output", tmp_path / "out", "--epochs", 1, "--size", 16, "--num-gpus", 0]
        distill.main([*map(str, [*common, *words]), "DATA.NUM_WORKERS", "0"])

    return run


def test_a_name_and_a_folder_become_a_student_and_a_table_and_a_second_call_trains_nothing(command, tmp_path, capsys):
    command("--baseline")
    out, printed = tmp_path / "out", capsys.readouterr().out
    assert "18 training and 6 validation images of 3 classes" in printed
    assert "cifar_resnet8 starts from scratch" in printed
    assert printed.index("student about") < printed.index("fitting a classifier of 3 classes")
    results = json.loads((out / "results.json").read_text())
    assert results["results"]["teacher"]["top1"] == 100  # the head was fitted: random ones have a third
    assert results["results"].keys() == {"teacher", "student", "baseline"}
    assert results["costs"]["student"]["parameters"] < results["costs"]["teacher"]["parameters"]
    assert len((out / "table.md").read_text().splitlines()) == 5
    page = (out / "report.html").read_text()
    assert all(word in page for word in (">teacher<", ">plain<", ">DKD<"))
    assert load_cfg(str(out / "distill.yaml")).KD.LOSS.NAME == "dkd"
    assert load_cfg(str(out / "baseline.yaml")).KD.LOSS.NAME == "none"
    model = timm.create_model("cifar_resnet8", num_classes=3)
    timm.models.load_checkpoint(model, str(out / "student" / "best.pth"))

    before = (out / "student" / "last.pth").stat().st_mtime_ns
    command("--baseline")
    assert (out / "student" / "last.pth").stat().st_mtime_ns == before
    assert "is finished" in capsys.readouterr().out
    assert json.loads((out / "results.json").read_text())["results"] == results["results"]
    written = (out / "distill.yaml").read_text()
    (out / "distill.yaml").write_text(written.replace("EPOCHS: 1.0", "EPOCHS: 2.0"))
    with pytest.raises(SystemExit, match=r"the run in OUTPUT_DIR .*student was started with SOLVER\.EPOCHS 1\.0, now"):
        command("--baseline")
    (out / "distill.yaml").write_text(written)
    with pytest.raises(SystemExit, match=r"holds another distillation: --method was dkd, is kd"):
        command("--method", "kd")


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dkd"])
def test_every_method_trains_and_its_baseline_does_without_it(method, command, tmp_path):
    command("--method", method, "--baseline")
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results.keys() == {"teacher", "student", "baseline"}
    cfg, plain = (load_cfg(str(tmp_path / "out" / name)) for name in ("distill.yaml", "baseline.yaml"))
    assert distils(cfg.KD) and not distils(plain.KD) and plain.DATA.VIEWS == 1


def test_a_student_with_weights_of_other_classes_starts_with_a_classifier_of_these(command, teacher_weights, tmp_path):
    words = ("--student", "cifar_resnet14", "--student-weights", teacher_weights)
    command(*words, "SOLVER.BASE_LR", 1e-9, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-9)
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert results["student"]["top1"] == 100  # a random classifier that is hardly trained has a third


def test_what_was_fitted_for_a_request_that_failed_does_not_serve_the_corrected_one(command, tmp_path):
    other = tmp_path / "other.pth"
    torch.save(timm.create_model("cifar_resnet20").state_dict(), other)
    with pytest.raises(SystemExit, match=r"other\.pth"):
        command("--student-weights", other)
    head = tmp_path / "out" / "teacher" / "head.pth"
    first = head.stat().st_mtime_ns
    assert not (tmp_path / "out" / "distill.yaml").exists()
    command("--student-weights", "")
    assert head.stat().st_mtime_ns != first


def test_the_forecast_of_several_processes_has_the_iterations_of_the_training(tiny, process, monkeypatch):
    monkeypatch.setattr("kd_cls.engine.forecast.statistics.median", lambda _: 1.0)
    cfg = tiny("SOLVER.EPOCHS", 4)
    assert training_seconds(cfg, process, 2) == training_seconds(cfg, process, 1)


@pytest.mark.parametrize(("images", "refused"), [(49, False), (34, True)])
def test_the_forecast_refuses_a_last_batch_of_one_image_as_the_training_will(images, refused, tiny, process):
    """A process of two has 25 of 49 images, 16 and 9, and 17 of 34, 16 and 1; the trial has all, and batches of 16."""
    cfg = tiny("KD.FEATURE.NAME", "review", "DATA.TRAIN_IMAGES", images, "SOLVER.IMS_PER_BATCH", 32)
    with pytest.raises(UserError, match="a last batch of one image") if refused else nullcontext():
        training_seconds(cfg, process, 2)


def test_a_baseline_has_one_view_and_keys_that_this_command_decides_are_refused(command):
    cfg = derive_student(Request("cifar_resnet8", "", "crld", "folder", "", classes=3, images=18))
    cfg.DATA.VIEWS_AT_ONCE = True
    plain = without_teacher(cfg)
    assert (plain.DATA.VIEWS, plain.DATA.VIEWS_AT_ONCE) == (1, False)
    for key in ("SEEDS", "OUTPUT_DIR", "DEVICE"):
        with pytest.raises(SystemExit, match=f"{key} is decided by this command"):
            command(key, "0")


def test_a_head_is_fitted_on_images_as_an_evaluation_sees_them(colours, process):
    cfg = derive_student(Request("cifar_resnet8", "", "dkd", "folder", str(colours), classes=3, images=18, size=16))
    cfg.DATA.NUM_WORKERS = 0
    stats = InputStats((0.0,) * 3, (1.0,) * 3, 16)
    (images, target), = distill.still_images(cfg, stats, process)
    expected = build_transforms("imagenet", (3, 16, 16))[1](Image.open(colours / "train" / "blue" / "0.png"))
    assert target.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    torch.testing.assert_close(images[0], expected / 255)


def test_a_teacher_that_is_missing_is_trained_where_that_is_asked_for(teacher_yaml, tmp_path):
    untrained = tmp_path / "teacher.yaml"
    untrained.write_text(f"_BASE_: {teacher_yaml}\nOUTPUT_DIR: {tmp_path / 'untrained'}\n")
    words = ["--teacher", untrained, "--student", "cifar_resnet8", "--name", "digits", "--output", tmp_path / "out"]
    words += ["--epochs", 1, "--size", 16, "--num-gpus", 0, "DATA.TRAIN_IMAGES", 64, "DATA.VAL_IMAGES", 33]
    distill.main(list(map(str, [*words, "KD.TEACHER.TRAIN_IF_MISSING", True])))
    assert (tmp_path / "untrained" / "last.pth").is_file()


def test_the_table_is_of_the_weights_in_best_pth(command, tmp_path):
    command("SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.5)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["student"]
    assert found["loss"] == evaluate.main(["--config-file", str(tmp_path / "out" / "student" / "config.yaml")])["loss"]


def test_an_interrupted_distillation_resumes_to_the_bit(command, tmp_path, monkeypatch):
    words = ("--batch", 6, "SOLVER.CHECKPOINT_PERIOD", 1)
    command(*words)
    undisturbed = torch.load(tmp_path / "out" / "student" / "last.pth", weights_only=True)["model"]
    (tmp_path / "out").rename(tmp_path / "first")

    after_step = Trainer.after_step

    def interrupted(trainer: Trainer) -> None:
        after_step(trainer)
        if trainer.iteration == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_step", interrupted)
        with pytest.raises(SystemExit, match="the same command resumes"):
            command(*words)
    assert torch.load(tmp_path / "out" / "student" / "last.pth", weights_only=True)["training"]["iteration"] == 2
    command(*words)
    resumed = torch.load(tmp_path / "out" / "student" / "last.pth", weights_only=True)["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())


def test_a_trained_teacher_of_ones_own_is_taken_as_it_is(teacher_yaml, tmp_path, capsys):
    words = ["--teacher", teacher_yaml, "--student", "cifar_resnet8", "--name", "digits", "--method", "gdkd"]
    words += ["--output", tmp_path / "out", "--epochs", 1, "--size", 16, "--num-gpus", 0]
    words += ["DATA.TRAIN_IMAGES", 64, "DATA.VAL_IMAGES", 33]
    distill.main(list(map(str, words)))
    assert "fitting a classifier" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "teacher" / "head.pth").exists()
    assert load_cfg(str(tmp_path / "out" / "distill.yaml")).KD.LOSS.GDKD.K == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--student", "cifar_resnet88"), r"--student cifar_resnet88 is not a network that timm knows; did you mean"),
        (("--teacher", "resnetto"), r"--teacher resnetto is not a network that timm knows; did you mean"),
        (("--teacher", "none.yaml"), r"--teacher: there is no file none\.yaml"),
        (("--teacher-weights", "none.pth"), r"--teacher-weights: there is no file none\.pth"),
        (("--data", ""), r"--data is missing: a FOLDER with train/<class>/ and val/<class>/; or try --name digits"),
        (("--data", "nowhere"), r"--data: there is no folder 'nowhere'; expected train/<class>/ and val/<class>/"),
        (("--method", "kdd"), r"--method kdd: expected one of kd, dkd"),
        (("SOLVER.EPOCH", "3"), r"unknown key SOLVER\.EPOCH; did you mean SOLVER\.EPOCHS"),
        (("SOLVER.LABEL_SMOOTHING", "2"), r"SOLVER\.LABEL_SMOOTHING is 2\.0, expected a number in \[0, 1\)"),
        (("--batch", "-4"), r"--batch is -4, expected a number above 0"),
        (("--num-gpus", "99"), r"--num-gpus 99, but this machine has"),
        (("--epochs", "0"), r"--epochs is 0\.0, expected a number above 0"),
    ],
)
def test_a_wrong_word_ends_in_one_sentence_and_may_be_corrected(command, words, message, tmp_path):
    with pytest.raises(SystemExit, match=message) as ended:
        command(*words)
    assert "\n" not in ended.value.code
    assert not (tmp_path / "out" / "distill.yaml").exists()


def test_a_classifier_is_fitted_on_single_plain_images_whatever_the_training_sees(tiny, process):
    stats = InputStats((0.5,) * 3, (0.5,) * 3, 16)
    imagenet = ["DATA.AUGMENTATION", "imagenet"]
    pairs = (imagenet, [*imagenet, "DATA.TIMM_OPTIONS", "{scale: [0.2, 1]}"]), ([], ["DATA.VIEWS", 2])
    for options in pairs:
        plain, other = (next(iter(distill.still_images(tiny(*words), stats, process)))[0] for words in options)
        assert other.shape == (16, 3, 16, 16) and torch.equal(other, plain)


def test_a_baseline_keeps_the_optimizer_unless_that_needs_a_teacher(tiny):
    adamw = without_teacher(tiny("KD.LOSS.NAME", "kd", "SOLVER.OPTIMIZER", "adamw", "SOLVER.BASE_LR", 0.001))
    assert (adamw.SOLVER.OPTIMIZER, adamw.SOLVER.BASE_LR, adamw.KD.LOSS.NAME) == ("adamw", 0.001, "none")
    deepkd = without_teacher(tiny("KD.LOSS.NAME", "dkd", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.STEP", "matched"))
    assert (deepkd.SOLVER.OPTIMIZER, deepkd.SOLVER.STEP) == ("sgd", "paper")


def test_a_broken_image_and_a_used_folder_are_refused_before_anything_is_trained(command, colours, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is not empty and holds no distillation"):
        command()
    root = tmp_path / "broken"
    for path in colours.rglob("*.png"):
        copy = root / path.relative_to(colours)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes()[: 60 if path.match("train/red/0.png") else None])
    with pytest.raises(SystemExit, match=r"image that cannot be decoded, the first: .*train/red/0\.png"):
        command("--data", root, "--output", tmp_path / "other")


def test_the_derived_rate_follows_the_batch_and_where_the_student_starts():
    def rate(weights: str, **options: int) -> float:
        request = Request("resnet18", weights, "dkd", "folder", "", classes=10, images=10_000, **options)
        return derive_student(request).SOLVER.BASE_LR

    assert rate("", batch=128) == 2 * rate("") == 2 * 5 * rate("timm")
    assert rate("", processes=4) == 4 * rate("")


def test_a_teacher_of_one_size_keeps_it_beside_a_smaller_student(tmp_path: Path) -> None:
    torch.save({"head.weight": torch.zeros(1000, 192)}, tmp_path / "vit.pth")
    words = ["--teacher", "vit_tiny_patch16_224", "--teacher-weights", tmp_path / "vit.pth", "--student", "resnet10t"]
    args = distill.parser().parse_args([*map(str, words), "--data", str(tmp_path), "--output", str(tmp_path)])
    assert distill.teacher_keys(args, 3, 176, tmp_path)["KD.TEACHER.INPUT_SIZE"] == 224
