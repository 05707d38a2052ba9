"""Several teachers: which they are, and how they teach together."""

import logging
import weakref

import pytest
import torch
from torch.testing import assert_close

from kd_core.losses import DKDLoss
from kd_core.utils.errors import UserError
from kd_det import Teacher
from kd_det.analysis.findings import use_random_teacher
from kd_det.config import kd_defaults, merge_file, merge_list
from kd_det.engine.console import describe
from kd_det.modeling.teacher.build import each_teacher
from kd_det.modeling.teacher.teacher import mean_of_teachers

DKD = ("KD.LOSS.NAME", "dkd", "KD.LOSS.TEMPERATURE", 1.0)
PAIRS = [["a.yaml", "a.pth"], ["b.yaml", ""]]


def teachers(tiny_model, count=2):
    """Random detectors of the tiny kind, each with other weights."""
    models = [tiny_model("MODEL.META_ARCHITECTURE", "GeneralizedRCNN") for _ in range(count)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed + 5)
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight)
    return [Teacher(model) for model in models]


def losses_of(model, batch, seed=0):
    torch.manual_seed(seed)
    return {name: loss for name, loss in model(batch).items() if "kd" in name}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_mean_of_log_probabilities_is_the_same_distribution_at_every_temperature(temperature):
    logits = list(torch.randn(3, 6, 5, dtype=torch.float64))
    slow = (
        torch.stack([(z / temperature).log_softmax(1) for z in logits]).mean(0).softmax(1)
    )  # normalised geometric mean
    assert_close((mean_of_teachers(logits) / temperature).softmax(1), slow)


def test_one_teacher_is_left_as_it_is_and_half_precision_is_widened():
    z = torch.randn(2, 3).half()
    assert mean_of_teachers([z]) is z
    assert mean_of_teachers([z, 60000 * z.sign()]).dtype == torch.float32
    assert mean_of_teachers([z, 60000 * z.sign()]).isfinite().all()


def test_binary_classifiers_are_averaged_by_their_log_odds():
    logits = list(torch.randn(2, 6, 5, dtype=torch.float64))
    p = torch.stack([z.sigmoid() for z in logits])
    odds = p.log().mean(0) - (1 - p).log().mean(0)  # normalised geometric mean of each [p, 1 − p]
    assert_close(mean_of_teachers(logits, sigmoid=True), odds)


def test_two_equal_teachers_teach_what_one_does(tiny_model, batch, storage):
    (one,) = teachers(tiny_model, 1)
    model = tiny_model(*DKD)
    model.teachers = [one]
    alone = losses_of(model, batch)
    model.teachers = [one, one]
    for model.teachers_mean in ("log_probs", "losses"):
        for name, loss in losses_of(model, batch).items():
            assert_close(loss, alone[name])


def test_the_mean_of_the_losses_is_taken_term_by_term(tiny_model, batch, storage):
    model = tiny_model(*DKD, "KD.TEACHERS_MEAN", "losses")
    both = teachers(tiny_model)
    alone = []
    for model.teachers in ([both[0]], [both[1]]):
        alone.append(losses_of(model, batch))
    model.teachers = both
    for name, loss in losses_of(model, batch).items():
        assert_close(loss, (alone[0][name] + alone[1][name]) / 2)
    model.teachers_mean = "log_probs"
    assert any(not torch.isclose(loss, (alone[0][n] + alone[1][n]) / 2) for n, loss in losses_of(model, batch).items())


def test_the_mean_of_log_probabilities_is_one_teacher_to_the_loss(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    model.teachers = teachers(tiny_model)
    seen = []
    model.loss.register_forward_pre_hook(lambda _, args: seen.append(args))
    losses = losses_of(model, batch)
    (student, teacher, target, _), *more = seen
    assert not more
    expected = DKDLoss(temperature=1.0)(student, teacher, target)
    assert torch.equal(losses["loss_kd_nckd"], expected["nckd"])
    assert_close(teacher.exp().sum(1) < 1, torch.ones(len(teacher), dtype=torch.bool))  # a geometric mean


def test_the_feature_maps_of_one_teacher_are_gone_before_the_next_ones_are_made(tiny_model, batch, storage):
    model = tiny_model(*DKD)
    model.teachers = teachers(tiny_model, 3)
    made, alive = [], []

    def before(*_):
        alive.append(sum(ref() is not None for ref in made))

    for teacher in model.teachers:
        teacher.model.backbone.register_forward_pre_hook(before)
        teacher.model.backbone.register_forward_hook(
            lambda _, __, maps: made.extend(weakref.ref(x) for x in maps.values())
        )
    model(batch)
    assert alive == [0, 0, 0] and len(made) == 15


def test_teachers_are_named_by_a_yaml_and_by_the_command_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("KD:\n  TEACHERS:\n  - [a.yaml, a.pth]\n  - [b.yaml, '']\n")
    from_file, from_line = kd_defaults(), kd_defaults()
    merge_file(from_file, str(path))
    merge_list(from_line, ["KD.TEACHERS", "[['a.yaml', 'a.pth'], ['b.yaml', '']]"])
    for cfg in (from_file, from_line):
        cfg.freeze()
        named = [[one.KD.TEACHER.CONFIG_FILE, one.KD.TEACHER.WEIGHTS] for one in each_teacher(cfg)]
        assert named == PAIRS
    again = kd_defaults()
    (tmp_path / "dumped.yaml").write_text(from_file.dump())
    merge_file(again, str(tmp_path / "dumped.yaml"))
    assert again.KD.TEACHERS == from_file.KD.TEACHERS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["KD.TEACHER.CONFIG_FILE", "t.yaml"], "KD.TEACHERS lists 2 teachers and KD.TEACHER names t.yaml beside them"),
        (["KD.TEACHER.OVERRIDES", "['a.b=1']"], r"KD.TEACHER names \['a.b=1'\] beside them"),
        (["KD.TEACHERS", "['a.yaml', 'a.pth']"], r"KD.TEACHERS is a list of \[config file, weights, .*, but 'a.yaml'"),
        (["KD.TEACHERS", "[['a.yaml']]"], r"but \['a.yaml'\] is none of these"),
    ],
)
def test_what_names_no_teachers_is_refused(overrides, message):
    cfg = kd_defaults()
    cfg.KD.TEACHERS = PAIRS
    merge_list(cfg, overrides)
    with pytest.raises(UserError, match=message):
        each_teacher(cfg)


def test_a_listed_teacher_with_overrides_is_described_and_keeps_them_where_it_has_random_weights(caplog):
    cfg = kd_defaults()
    merge_list(cfg, ["KD.LOSS.NAME", "dkd", "KD.TEACHERS", "[['a.py', 'a.pth', 'x.y=1'], ['b.yaml', 'b.pth']]"])
    with caplog.at_level(logging.INFO, logger="kd_det"):
        describe(cfg, parameters=1, trained=1, images=1, start_iter=0)
    assert "a.py with a.pth, b.yaml with b.pth" in caplog.text
    use_random_teacher(cfg, 0)
    assert cfg.KD.TEACHERS == [["a.py", "", "x.y=1"], ["b.yaml", "b.pth"]]


def test_a_model_is_built_with_every_listed_teacher_and_its_errors_say_which(tiny_cfg, tiny_model, batch, storage):
    path = tiny_cfg().KD.TEACHER.CONFIG_FILE
    listed = ("KD.TEACHER.CONFIG_FILE", "", "KD.TEACHERS")
    model = tiny_model(*DKD, *listed, f"[['{path}', ''], ['{path}', '']]")
    assert {"loss_kd_tckd", "loss_kd_nckd"} <= set(model(batch))
    first, second = (teacher.model for teacher in model.teachers)
    assert first is not second and model.teacher is model.teachers[0]
    broken = tiny_model(*DKD, *listed, f"[['{path}', ''], ['{path}', 'no/such.pth']]")
    with pytest.raises(UserError, match=r"KD.TEACHERS\[1\]: KD.TEACHER.WEIGHTS: there is no file no/such.pth"):
        broken.load_teacher()
    with pytest.raises(UserError, match=r"KD.TEACHERS_MEAN is 'median', expected log_probs or losses"):
        tiny_model(*DKD, "KD.TEACHERS_MEAN", "median")
