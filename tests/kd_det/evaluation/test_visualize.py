"""The picture that compares several trainings."""

import numpy as np
from detectron2.modeling import build_model
from PIL import Image

from kd_det.checkpoint.checkpointer import WholeCheckpointer
from kd_det.config.student import student_config, write_student
from kd_det.evaluation.visualize import draw_comparison


def test_the_comparison_has_a_row_per_image_and_a_column_per_training(tiny_cfg, tmp_path):
    cfg = tiny_cfg("OUTPUT_DIR", tmp_path / "run")
    (tmp_path / "run").mkdir()
    write_student(student_config(cfg), tmp_path / "run" / "student.yaml")
    WholeCheckpointer(build_model(cfg), cfg.OUTPUT_DIR).save("model_final")
    pictures = []
    for images in (1, 2):
        path = tmp_path / "new" / f"{images}.png"
        draw_comparison({"one": tmp_path / "run", "two": tmp_path / "run"}, "digits_val", path, images, threshold=0.1)
        pictures.append(np.asarray(Image.open(path)))
    one, two = pictures
    assert two.shape == (2 * one.shape[0], *one.shape[1:]) and np.array_equal(two[: len(one)], one)
    truth, first, second = (one[30:, start : start + 384] for start in (0, 390, 780))  # the digits, twice as large
    assert np.array_equal(first, second) and not np.array_equal(truth, first)
