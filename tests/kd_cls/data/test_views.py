"""Two views of each training image: drawn from (seed, epoch, index), normalised, and refused where one is needed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kd_cls.build import build_trainer
from kd_cls.checks import check_config
from kd_cls.data import set_epoch
from kd_cls.data.build import build_data, build_loaders
from kd_cls.data.statistics import InputStats
from kd_cls.data.transforms import build_transforms
from kd_cls.data.views import Cutout, fixmatch_augment, strong_view
from kd_cls.distributed import Process
from kd_core.utils.errors import UserError
from kd_core.utils.rng import seed_rng

STATS = InputStats((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 16)


def image_of_noise(size: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def batches(tiny: Callable, process: Process, views: int, epoch: int = 0, **options: Any) -> list[Tensor]:
    """The images of an epoch."""
    words = [word for key, value in options.items() for word in (f"DATA.{key}", value)]
    cfg = tiny("DATA.VIEWS", views, "DATA.AUGMENTATION", "cifar", *words)
    train = build_loaders(cfg, build_data(cfg), STATS, process).train
    set_epoch(train, epoch)
    return [images for images, _ in train]


def test_the_weak_view_is_the_image_of_training_with_one_and_the_strong_one_another(
    tiny: Callable, process: Process
) -> None:
    one, two = batches(tiny, process, 1), batches(tiny, process, 2)
    for images, both in zip(one, two, strict=True):
        weak, strong = both.chunk(2, 1)
        assert both.shape[1] == 6
        assert torch.equal(weak, images)
        assert (strong != weak).flatten(1).any(1).float().mean() > 0.8


def test_both_views_are_functions_of_seed_epoch_and_image_for_any_workers(tiny: Callable, process: Process) -> None:
    first, again = batches(tiny, process, 2, 1), batches(tiny, process, 2, 1, NUM_WORKERS=2)
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    strong = [torch.cat(batches(tiny, process, 2, epoch, SHUFFLE=False))[:, 3:] for epoch in (0, 1)]
    assert not torch.equal(*strong)


@pytest.mark.parametrize("name", ["cifar", "digits", "imagenet", "tiny_imagenet_64", "none"])
def test_every_augmentation_has_a_strong_form_of_the_same_size(name: str) -> None:
    weak, _ = build_transforms(name, (3, 24, 24))
    seed_rng(0)
    views = [strong_view(weak)(image_of_noise(40)) for _ in range(20)]
    assert all(view.shape == (3, 24, 24) and view.dtype == torch.uint8 for view in views)


def test_an_operation_is_skipped_as_often_as_the_identity_would_be_drawn_among_fourteen() -> None:
    seed_rng(0)
    augment = fixmatch_augment()
    assert len(augment.ops) == 13
    assert {operation.prob for operation in augment.ops} == {13 / 14}
    image = image_of_noise()
    same = sum(augment(image).tobytes() == image.tobytes() for _ in range(2000))
    assert 0.0 < same / 2000 < 0.1  # both skipped: 1 in 196; and a rotation or posterization by next to nothing


def test_cutout_paints_one_rectangle_of_at_most_half_the_width() -> None:
    seed_rng(0)
    painted = []
    for _ in range(200):
        changed = (np.asarray(Cutout(0.5)(Image.new("RGB", (32, 32)))) != 0).any(2)
        rows, columns = changed.any(1).sum(), changed.any(0).sum()
        assert changed.sum() == rows * columns  # a full rectangle
        painted.append(max(rows, columns))
    assert max(painted) in (16, 17)


def test_batch_norm_sees_one_view_at_a_time(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("DATA.VIEWS", 2, "KD.LOSS.NAME", "crld"), process)
    task = trainer.task.train()
    images, target = next(iter(trainer.loaders.train))
    student = task.trainable_module
    start = {name: value.clone() for name, value in student.state_dict().items()}
    task(images, target)
    found = {name: value.clone() for name, value in student.state_dict().items()}
    student.load_state_dict(start)
    for view in images.chunk(2, 1):
        student(view)
    assert all(torch.equal(found[name], value) for name, value in student.state_dict().items())


def test_both_views_at_once_differ_in_batch_norm_alone(tiny: Callable, process: Process) -> None:
    results = {}
    for frozen in (True, False):
        for once in (True, False):
            options = ("DATA.VIEWS", 2, "KD.LOSS.NAME", "crld", "MODEL.FREEZE_BN", frozen, "DATA.VIEWS_AT_ONCE", once)
            trainer = build_trainer(tiny(*options), process)
            images, target = next(iter(trainer.loaders.train))
            task = trainer.task.train()
            task.trainable_module.double(), task.teacher.double()
            task.teacher_logits(images.double(), 0, torch.arange(len(images)))
            results[frozen, once] = task(images.double(), target)["loss"]
    torch.testing.assert_close(results[True, True], results[True, False])
    assert abs(results[False, True] - results[False, False]) > 1e-3


def test_the_task_s_loss_is_the_sum_over_both_views(tiny: Callable, process: Process) -> None:
    trainer = build_trainer(tiny("DATA.VIEWS", 2, "KD.LOSS.NAME", "mlkd", "KD.TASK_WEIGHT", 0.5), process)
    task = trainer.task.train()
    images, target = next(iter(trainer.loaders.train))
    result = task(images, target)
    outputs = [task.trainable_module.predict(view) for view in images.chunk(2, 1)]
    by_hand = 0.5 * sum(torch.nn.functional.cross_entropy(output, target) for output in outputs)
    torch.testing.assert_close(result["task"], by_hand)
    torch.testing.assert_close(result["output"], outputs[0])
    assert task.streams == {"task": "tog", "tckd": "tcg", "nckd": "ncg", "class": "tog", "batch": "tog"}
    assert task.stream_losses(result)["tog"] == result["task"] + result["class"] + result["batch"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.MIXUP.ALPHA", 0.4], "DATA.VIEWS 2 does not go with SOLVER.MIXUP, a mixed image has no label"),
        (["DATA.RESIDENT", True], "DATA.VIEWS 2 does not go with DATA.RESIDENT, RandAugment works on single images"),
        (["DATA.VIEWS", 3], "DATA.VIEWS is 3, expected 1 or 2"),
        (["DATA.VIEWS", 1, "DATA.VIEWS_AT_ONCE", True], "VIEWS_AT_ONCE puts two views through one pass, .* is 1 and"),
        (["DATA.VIEWS_AT_ONCE", True, "KD.FEATURE.NAME", "review"], "but DATA.VIEWS is 2 and KD.FEATURE.NAME review"),
    ],
)
def test_what_knows_one_view_only_is_refused(options: list, message: str, tiny: Callable, process: Process) -> None:
    with pytest.raises(UserError, match=message):
        check_config(tiny("DATA.VIEWS", 2, *options), process)


@pytest.mark.parametrize(("views", "name"), [(1, "crld"), (2, "kd")])
def test_a_loss_of_another_number_of_views_is_refused(views: int, name: str, tiny: Callable, process: Process) -> None:
    with pytest.raises(
        ValueError, match=rf"KD.LOSS.NAME '{name}' compares .* of each image, but there are {views} here"
    ):
        build_trainer(tiny("DATA.VIEWS", views, "KD.LOSS.NAME", name), process)
