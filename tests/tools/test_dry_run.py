"""A dry run lists all that is missing, builds and steps all the same, and its figures are those of the schedule."""

import json
from pathlib import Path

import pytest

from helpers.few_digits import few_digits
from kd_core.utils.files import write_text
from kd_det.analysis.findings import STAND_IN, collect_problems
from kd_det.engine.launch import read_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dry_run(load_tool):
    return load_tool("dry_run")


@pytest.fixture
def distilled(tiny_cfg, save_run, tmp_path: Path):
    """The yaml of a tiny student whose tiny teacher is there."""
    teacher = save_run(tiny_cfg("OUTPUT_DIR", tmp_path / "teacher"))
    cfg = tiny_cfg(
        "KD.LOSS.NAME", "dkd", "KD.TEACHER.CONFIG_FILE", teacher / "student.yaml", "KD.TEACHER.WEIGHTS",
        teacher / "model_final.pth", "SOLVER.OPTIMIZER", "deepkd_sgd", "SOLVER.IMS_PER_BATCH", 4,
    )  # fmt: skip
    write_text(tmp_path / "student.yaml", cfg.dump())
    return tmp_path / "student.yaml"


def figures(text: str) -> dict[str, str]:
    """The lines of the report, by what stands before their colon."""
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def test_a_training_that_lacks_nothing_is_estimated_and_leaves_nothing(dry_run, distilled, tmp_path, capsys):
    assert dry_run.main([str(distilled)]) == 0
    lines = figures(capsys.readouterr().out)
    assert "frozen, teacher 0.0" in lines["built"]
    seconds = float(lines["one step of one image"].split(" s on ")[0])
    assert "loss_kd_nckd" in lines["one step of one image"] and 0 < seconds < 60
    assert lines["schedule"].startswith("100 iterations of 4 images (0.4 epochs) by 1 such process: about ")
    assert lines["memory"].startswith("about ") and "an image" in lines["memory"]
    assert not (tmp_path / "run").exists()  # OUTPUT_DIR


def test_more_processes_take_less_time_and_memory_each(dry_run, distilled):
    from kd_det.analysis.cost import measure

    cfg = read_config(str(distilled), ["MODEL.DEVICE", "cpu"])
    one = measure(cfg, 1, stands_in=False)
    assert one.total_seconds == pytest.approx(100 * 4 * one.step_seconds)
    assert one.process_bytes == one.fixed_bytes + 4 * one.image_bytes
    assert one.checkpoint_bytes == pytest.approx(3 * 4 * one.parameters, rel=0.1)  # weights, and DeepKD's two buffers
    assert one.trained == one.parameters and one.epochs == 100 * 4 / 1000
    weights = one.disk_bytes - one.checkpoint_bytes  # of the best checkpoint
    assert weights == pytest.approx(4 * one.parameters, rel=0.1)


def test_all_that_is_missing_stands_in_one_list_and_the_step_is_taken_without_it(dry_run, distilled, capsys):
    options = [
        "DATASETS.TRAIN", "('coco_2017_train',)", "DATASETS.TEST", "('nowhere_val',)", "MODEL.WEIGHTS", "no/r18.pth",
        "KD.TEACHER.WEIGHTS", "no/teacher.pth", "MODEL.MASK_ON", "True", "MODEL.ROI_HEADS.NUM_CLASSES", "10",
        "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
    ]  # fmt: skip
    assert dry_run.main([str(distilled), *options]) == 1
    text = capsys.readouterr().out
    for number, part in enumerate(
        ["DATASETS.TRAIN: coco_2017_train is not on disk", "DATASETS.TEST: no data set is called 'nowhere_val'",
         "MODEL.WEIGHTS: there is no file no/r18.pth", "KD.TEACHER.WEIGHTS: there is no file no/teacher.pth"], start=1,
    ):  # fmt: skip
        assert f"  {number}. {part}" in text
    assert "the built-in digits, enlarged to INPUT.MIN_SIZE_TRAIN" in text
    assert "loss_kd_nckd" in text and "loss_mask" in text and "4 missing or wrong" in text and "epochs" not in text


def test_weights_that_training_fetches_are_named_and_not_fetched():
    cfg = read_config(str(ROOT / "configs" / "COCO" / "dkd_r50_r101.yaml"), [])
    found = collect_problems(cfg, 8)
    assert any(line.startswith("KD.TEACHER.WEIGHTS: detectron2://") for line in found.to_fetch)
    assert found.runnable.DATASETS.TRAIN == (STAND_IN,) and found.runnable.KD.TEACHER.WEIGHTS == ""


def test_weights_that_a_training_does_not_read_are_not_fetched(tmp_path):
    """A checkpoint in MODEL.WEIGHTS brings the backbone."""
    weights = tmp_path / "student.pth"
    weights.touch()
    cfg = read_config(str(ROOT / "configs" / "CamVid" / "baseline.yaml"), ["MODEL.TIMM.PRETRAINED", "True"])
    assert any("MODEL.TIMM.PRETRAINED" in line for line in collect_problems(cfg, 1).to_fetch)
    cfg.MODEL.WEIGHTS = str(weights)
    assert not any("MODEL.TIMM" in line for line in collect_problems(cfg, 1).to_fetch)


def test_wrong_keys_are_listed_together(tiny_cfg):
    found = collect_problems(
        tiny_cfg(
            "SOLVER.OPTIMIZER", "adam", "KD.LOSS.NAME", "dkd", "KD.TEACHER.CONFIG_FILE", "no.yaml",
            "KD.LOSS.TEMPERATURE", 0, "MODEL.BACKBONE.FREEZE_AT", 2, "SOLVER.IMS_PER_BATCH", 3,
        ), world_size=2,
    )  # fmt: skip
    text = "\n".join(found.missing)
    for part in ("SOLVER.OPTIMIZER is 'adam'", "temperature must be above 0", "random layers would stay frozen",
                 "SOLVER.IMS_PER_BATCH 3 must be a positive multiple", "KD.TEACHER.CONFIG_FILE: no.yaml is neither",
                 "KD.TEACHER.WEIGHTS is empty"):  # fmt: skip
        assert part in text
    assert found.runnable.KD.LOSS.NAME == "none"


def test_what_does_not_build_is_reported_as_such(dry_run, distilled, capsys):
    assert dry_run.main([str(distilled), "MODEL.RESNETS.DEPTH", "49"]) == 1
    assert "it does not build or step: KeyError: 49" in capsys.readouterr().out


def test_an_image_that_cannot_be_decoded_is_found_unless_they_are_left_out(dry_run, distilled, tmp_path, capsys):
    entry = few_digits(tmp_path, 3)
    names = [image["file_name"] for image in json.loads(Path(entry[1]).read_text())["images"]]
    for name in names:
        (tmp_path / name).write_bytes(Path(entry[2], name).read_bytes())
    entry[2], broken = str(tmp_path), tmp_path / names[1]
    options = ["DATASETS.REGISTER", str([entry]), "DATASETS.TRAIN", f"('{entry[0]}',)"]
    assert dry_run.main([str(distilled), *options]) == 0
    broken.write_bytes(broken.read_bytes()[:200])
    capsys.readouterr()
    assert dry_run.main([str(distilled), *options]) == 1
    text = capsys.readouterr().out
    assert f"  1. DATASETS.TRAIN: {entry[0]}: image that cannot be decoded (1): {broken}" in text
    assert dry_run.main([str(distilled), "--no-images", *options]) == 0
    assert "nothing is missing, but the images were not decoded" in capsys.readouterr().out
    assert dry_run.main([str(distilled), *options, "DATASETS.BAD_IMAGES", "skip"]) == 0


def test_a_value_that_nothing_can_be_divided_by_is_one_finding_beside_the_estimate(dry_run, distilled, capsys):
    assert dry_run.main([str(distilled), "SOLVER.ACCUMULATE_STEPS", "0"]) == 1
    text = capsys.readouterr().out
    assert "SOLVER.ACCUMULATE_STEPS is 0, expected a whole number ≥ 1" in text
    assert "1 missing or wrong" in text and "memory: about" in text


def test_a_config_that_is_not_there_ends_in_one_line(dry_run):
    with pytest.raises(SystemExit, match=r"^dry_run: --config-file: there is no file none.yaml"):
        dry_run.main(["none.yaml"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5.0 seconds"), (90, "1.5 minutes"), (5400, "1.5 hours"), (129600, "1.5 days")]
)
def test_durations_are_in_the_unit_that_they_fill(dry_run, seconds, text):
    assert dry_run.duration(seconds) == text
