"""The teacher: its own preprocessing, frozen, whole, and of the student's classes."""

from collections.abc import Callable
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import save_file
from timm import create_model

from kd_cls.build import build_trainer
from kd_cls.checkpoint.checkpoint import load_weights
from kd_cls.data.statistics import InputStats
from kd_cls.distributed import Process
from kd_cls.task.teacher import Teacher, build_teacher
from kd_core.utils.errors import UserError
from kd_core.utils.state_dict import weights_digest

STUDENT = InputStats((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 16)
RANDOM = ["KD.LOSS.NAME", "kd", "KD.TEACHER.NAME", "cifar_resnet14", "KD.TEACHER.ALLOW_RANDOM", True]


def normalised(pixels: torch.Tensor, stats: InputStats) -> torch.Tensor:
    """(x − mean) / std, channel by channel."""
    return torch.stack([(pixels[:, c] - stats.mean[c]) / stats.std[c] for c in range(3)], dim=1)


def test_a_teacher_sees_the_images_under_its_own_mean_and_std() -> None:
    model = create_model("cifar_resnet14", num_classes=10).double()
    own = InputStats((0.1, 0.2, 0.9), (0.5, 0.1, 0.7), 16)
    teacher = Teacher(model, own, STUDENT).double()
    pixels = torch.rand(4, 3, 16, 16, dtype=torch.float64)
    expected = model.eval()(normalised(pixels, own))
    assert (teacher(normalised(pixels, STUDENT)) - expected).abs().max() < 1e-6
    assert torch.equal(Teacher(model, STUDENT, STUDENT)(pixels), model(pixels))  # equal statistics: nothing is done


def test_a_teacher_of_another_input_size_sees_the_images_enlarged() -> None:
    model = create_model("test_vit", num_classes=10)
    size = model.pretrained_cfg["input_size"][-1]
    teacher = Teacher(model, InputStats(STUDENT.mean, STUDENT.std, size), STUDENT)
    images = torch.randn(2, 3, 16, 16)
    enlarged = torch.nn.functional.interpolate(images, (size, size), mode="bilinear", antialias=True)
    assert torch.equal(teacher(images), model(enlarged)) and teacher(images).shape == (2, 10)


def test_a_network_of_fixed_size_gets_it_without_being_asked(tiny: Callable) -> None:
    cfg = tiny(*RANDOM, "KD.TEACHER.NAME", "test_vit")
    assert build_teacher(cfg, 10, STUDENT).stats.size == 160
    assert build_teacher(tiny(*RANDOM), 10, STUDENT).stats.size == STUDENT.size
    assert build_teacher(tiny(*RANDOM, "KD.TEACHER.INPUT_SIZE", 24), 10, STUDENT).stats.size == 24


def test_a_teacher_stays_as_it_is_and_out_of_every_checkpoint(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny(*RANDOM, "SOLVER.EMA.ENABLED", True), process)
    teacher = trainer.task.teacher
    before = weights_digest(teacher.model.state_dict())
    trainer.run()
    assert weights_digest(teacher.model.state_dict()) == before
    assert not any(module.training for module in trainer.task.train().teacher.modules())
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()} and not any(
        p.requires_grad for p in teacher.parameters()
    )
    saved = torch.load(Path(trainer.cfg.OUTPUT_DIR, "last.pth"), weights_only=True)
    assert set(saved) == {"model", "model_ema", "factors", "metadata", "training"}
    assert list(saved["model"]) == list(saved["model_ema"]) == list(create_model("cifar_resnet8").state_dict())


def test_a_checkpoint_says_how_its_teacher_was_fed(tiny: Callable, run: Callable, tmp_path: Path) -> None:
    run("OUTPUT_DIR", tmp_path / "other", "MODEL.MEAN", "[0.9, 0.8, 0.7]", "MODEL.STD", "[1, 2, 3]")
    weights = [
        "KD.LOSS.NAME",
        "kd",
        "KD.TEACHER.NAME",
        "cifar_resnet8",
        "KD.TEACHER.WEIGHTS",
        tmp_path / "other" / "last.pth",
    ]
    assert build_teacher(tiny(*weights), 10, STUDENT).stats == ((0.9, 0.8, 0.7), (1.0, 2.0, 3.0), 16)
    stated = build_teacher(tiny(*weights, "KD.TEACHER.MEAN", "[0.5, 0.5, 0.5]"), 10, STUDENT).stats
    assert stated == ((0.5, 0.5, 0.5), (1.0, 2.0, 3.0), 16)


def test_weights_come_as_ours_as_published_as_plain_and_as_safetensors(tmp_path: Path) -> None:
    source = create_model("cifar_resnet8", num_classes=10)
    state = source.state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"epoch": 240, "model": state}, tmp_path / "published.pth")
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "wrapped.pth")
    save_file(state, tmp_path / "weights.safetensors")
    for name in ("plain.pth", "published.pth", "wrapped.pth", "weights.safetensors"):
        model = create_model("cifar_resnet8", num_classes=10)
        load_weights(model, str(tmp_path / name), "KD.TEACHER.WEIGHTS")
        assert weights_digest(model.state_dict()) == weights_digest(source.state_dict()), name


def test_weights_may_come_from_an_url(tiny: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "www").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    source = create_model("cifar_resnet8", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "www" / "weights.pth")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "www"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/weights.pth"
        model = create_model("cifar_resnet8", num_classes=10)
        load_weights(model, url, "KD.TEACHER.WEIGHTS")
        assert weights_digest(model.state_dict()) == weights_digest(source.state_dict())
        with pytest.raises(UserError, match=r"KD.TEACHER.WEIGHTS: http://.*/gone.pth cannot be fetched"):
            load_weights(model, url.replace("weights", "gone"), "KD.TEACHER.WEIGHTS")
        written = {"mean": [0.9, 0.8, 0.7], "std": [1, 2, 3], "size": 24}
        metadata = {"architecture": "cifar_resnet8", "num_classes": 10, "input": written}
        torch.save({"model": source.state_dict(), "metadata": metadata}, tmp_path / "www" / "ours.pth")
        words = ["KD.LOSS.NAME", "kd", "KD.TEACHER.NAME", "cifar_resnet8"]
        cfg = tiny(*words, "KD.TEACHER.WEIGHTS", url.replace("weights", "ours"))
        assert build_teacher(cfg, 10, STUDENT).stats == ((0.9, 0.8, 0.7), (1, 2, 3), 24)  # as from a file
        with pytest.raises(UserError, match="is a teacher of 10 classes, the student learns 20"):
            build_teacher(cfg, 20, STUDENT)
        server.shutdown()


def test_a_student_may_start_from_weights_of_other_classes(tmp_path: Path) -> None:
    source, model = create_model("cifar_resnet8", num_classes=100), create_model("cifar_resnet8", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "source.pth")
    with pytest.raises(
        ValueError, match=r"MODEL.WEIGHTS: .* 2 weights have another shape, the first is fc.weight with \(100, 64\)"
    ):
        load_weights(model, str(tmp_path / "source.pth"), "MODEL.WEIGHTS")
    classifier = model.fc.weight.clone()
    load_weights(model, str(tmp_path / "source.pth"), "MODEL.WEIGHTS", new_classifier=True)
    assert torch.equal(model.fc.weight, classifier) and torch.equal(model.conv1.weight, source.conv1.weight)


def save(path: Path, state: object) -> Path:
    torch.save(state, path)
    return path


def damaged(folder: Path) -> dict[str, Path]:
    """Files that are no weights of a cifar_resnet8 for 10 classes."""
    state = create_model("cifar_resnet8", num_classes=10).state_dict()
    whole = save(folder / "whole.pth", state)
    (folder / "truncated.pth").write_bytes(whole.read_bytes()[:20000])
    (folder / "text.pth").write_text("these are not weights")
    return {
        "missing": save(folder / "missing.pth", {name: state[name] for name in list(state)[1:]}),
        "other": save(folder / "other.pth", create_model("cifar_vgg8", num_classes=10).state_dict()),
        "list": save(folder / "list.pth", [1, 2]),
        "unsafe": save(folder / "unsafe.pth", {"model": state, "code": Path("x")}),
        "truncated": folder / "truncated.pth",
        "text": folder / "text.pth",
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"lacks 1 weights of the model, the first is conv1.weight"),
        ("other", r".* and has \d+ others, the first is"),
        ("list", r"cannot be read as weights"),
        ("unsafe", r"cannot be read as weights"),
        ("truncated", r"cannot be read as weights"),
        ("text", r"cannot be read as weights"),
    ],
)
def test_a_teacher_that_is_not_whole_is_refused(kind: str, message: str, tmp_path: Path, tiny: Callable) -> None:
    path = damaged(tmp_path)[kind]
    cfg = tiny("KD.LOSS.NAME", "kd", "KD.TEACHER.NAME", "cifar_resnet8", "KD.TEACHER.WEIGHTS", path)
    with pytest.raises(UserError, match=r"KD.TEACHER.WEIGHTS: .*" + message):
        build_teacher(cfg, 10, STUDENT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["KD.TEACHER.NAME", "cifar_resnet14"], r"KD.TEACHER.WEIGHTS is empty: name the teacher's weights"),
        (
            ["KD.TEACHER.NAME", "cifar_resnet14", "KD.TEACHER.WEIGHTS", "gone.pth"],
            r"WEIGHTS: there is no file gone.pth",
        ),
        (["KD.TEACHER.NAME", "resnet_9000"], r"KD.TEACHER.NAME is 'resnet_9000', which timm does not know"),
        (
            ["KD.TEACHER.NAME", "resnet18.tv_in1k", "KD.TEACHER.PRETRAINED", True],
            r"know 1000 classes, the student learns 10",
        ),
        (["KD.TEACHER.CONFIG_FILE", "gone.yaml"], r"there is no file gone.yaml"),
        (
            ["KD.TEACHER.NAME", "resnet18", "KD.TEACHER.CONFIG_FILE", "a.yaml"],
            r"set one of KD.TEACHER.CONFIG_FILE \(now 'a.yaml'\)",
        ),
    ],
)
def test_a_teacher_that_is_not_said_is_asked_for(options: list, message: str, tiny: Callable) -> None:
    with pytest.raises(UserError, match=message):
        build_teacher(tiny("KD.LOSS.NAME", "kd", *options), 10, STUDENT)


def test_a_teacher_of_other_classes_is_refused(tiny: Callable, run: Callable, tmp_path: Path) -> None:
    run("OUTPUT_DIR", tmp_path / "digits")
    weights = ["KD.TEACHER.NAME", "cifar_resnet8", "KD.TEACHER.WEIGHTS", tmp_path / "digits" / "last.pth"]
    with pytest.raises(UserError, match=r"is a teacher of 10 classes, the student learns 100 \(digits\)"):
        build_teacher(tiny("KD.LOSS.NAME", "kd", *weights), 100, STUDENT)
