"""Order and augmentation as pure functions of (seed, epoch, index), and the papers' transforms against obvious ones."""

import random
from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from kd_cls.data import (
    AUGMENTATIONS,
    EpochSampler,
    ReproducibleDataset,
    build_transforms,
    create_datasets,
    create_loaders,
    set_epoch,
)
from kd_core.utils.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SETTINGS = {"augmentation": "cifar", "input_size": (3, 32, 32), "mean": MEAN, "std": STD, "batch_size": 8}


class Noise(Dataset):
    """Images of noise; the target of image i is i."""

    def __init__(self, count: int, size: int = 32) -> None:
        self.images = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        self.transform: Callable | None = None
        self.classes = [str(i) for i in range(count)]

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index])
        return (image if self.transform is None else self.transform(image)), index

    def __len__(self) -> int:
        return len(self.images)


class ThreeDraws(Dataset):
    """A number from each generator that a transform may use."""

    transform = None

    def __getitem__(self, index: int) -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), torch.rand(()).item()

    def __len__(self) -> int:
        return 6


def rng_states() -> list:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_every_epoch_has_its_own_order_of_all_images_and_always_the_same() -> None:
    sampler = EpochSampler(20, 6, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(20)) and len(sampler) == 20
    assert orders[0] != orders[1] != orders[2]
    assert EpochSampler(20, 6, seed=3).order(1).tolist() == orders[1]
    assert EpochSampler(20, 6, seed=4).order(1).tolist() != orders[1]
    assert EpochSampler(20, 6, shuffle=False).order(1).tolist() == list(range(20))


def test_an_epoch_goes_on_from_any_batch() -> None:
    sampler = EpochSampler(20, 6)
    for start in range(sampler.num_batches + 1):
        sampler.set_epoch(5, start_batch=start)
        assert list(sampler) == sampler.order(5).tolist()[6 * start :]
        assert len(sampler) == len(list(sampler))
    with pytest.raises(ValueError, match=r"start_batch 5 is not in the epoch's 0 … 4 batches"):
        sampler.set_epoch(5, start_batch=5)


def test_a_step_of_several_ranks_sees_the_images_of_one_large_batch() -> None:
    ranks = [EpochSampler(24, 4, seed=1, rank=rank, world_size=3) for rank in range(3)]
    one = EpochSampler(24, 12, seed=1)
    for batch in range(2):
        together = torch.cat([rank.batch_indices(7, batch) for rank in ranks])
        assert sorted(together.tolist()) == sorted(one.batch_indices(7, batch).tolist())


def test_ranks_that_do_not_divide_the_images_repeat_the_first_ones() -> None:
    ranks = [EpochSampler(10, 4, rank=rank, world_size=4) for rank in range(4)]
    orders = [rank.order(0).tolist() for rank in ranks]
    assert [len(order) for order in orders] == [3, 3, 3, 3]
    assert set().union(*orders) == set(range(10))


def test_more_ranks_than_images_still_give_each_an_image() -> None:
    assert [EpochSampler(2, 4, rank=rank, world_size=5).order(0).numel() for rank in range(5)] == [1] * 5


def test_dropping_the_last_batch_leaves_full_batches_only() -> None:
    sampler = EpochSampler(21, 4, world_size=2, drop_last=True)
    assert (sampler.num_samples, sampler.num_batches) == (8, 2)
    with pytest.raises(UserError, match=r"7 training images do not fill one batch of 4 on 2 rank\(s\)"):
        EpochSampler(7, 4, world_size=2, drop_last=True)


def test_all_three_generators_are_a_function_of_seed_epoch_and_index() -> None:
    dataset = ReproducibleDataset(ThreeDraws(), seed=5)
    first = [dataset[index] for index in range(6)]
    assert [dataset[index] for index in reversed(range(6))] == first[::-1]
    assert len(set(sum(first, ()))) == 18
    dataset.set_epoch(1)
    assert not set(dataset[0]) & set(first[0])
    assert not set(ReproducibleDataset(ThreeDraws(), seed=6)[0]) & set(first[0])


def test_augmentations_come_again_after_the_asked_number_of_epochs() -> None:
    dataset = ReproducibleDataset(ThreeDraws(), seed=5, augmentation_epochs=2)
    epochs = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        epochs.append(dataset[3])
    assert epochs[0] == epochs[2] != epochs[1] == epochs[3]


def test_an_image_leaves_the_generators_where_they_were() -> None:
    before = rng_states()
    ReproducibleDataset(ThreeDraws(), seed=5)[0]
    assert rng_states() == before


def test_workers_draw_what_the_main_process_draws_and_follow_the_epoch() -> None:
    dataset = ReproducibleDataset(ThreeDraws(), seed=5)
    workers = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in range(2):
        dataset.set_epoch(epoch)
        assert [tuple(draws) for draws in workers] == [dataset[index] for index in range(6)]


def test_batches_are_the_same_to_the_bit_for_any_number_of_workers() -> None:
    alone, workers = (create_loaders(Noise(20), Noise(4), **SETTINGS, num_workers=n).train for n in (0, 2))
    for epoch in range(2):
        set_epoch(alone, epoch)
        set_epoch(workers, epoch)
        for (images, target), (images_again, target_again) in zip(alone, workers, strict=True):
            assert torch.equal(images, images_again) and torch.equal(target, target_again)


def test_batches_are_normalised_images_and_their_targets() -> None:
    train = Noise(20)
    loaders = create_loaders(train, Noise(12), **(SETTINGS | {"augmentation": "none"}))
    reference = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    for loader, steps in ((loaders.train, 3), (loaders.val, 2)):
        batches = list(loader)
        assert len(batches) == len(loader) == steps
        for images, target in batches:
            expected = torch.stack([reference(Image.fromarray(train.images[i])) for i in target])
            torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
            assert target.dtype == torch.int64


def test_the_sampler_knows_the_images_of_every_batch() -> None:
    loader = create_loaders(Noise(20), Noise(4), **SETTINGS).train
    set_epoch(loader, 3)
    for batch, (_, target) in enumerate(loader):
        assert target.tolist() == loader.sampler.batch_indices(3, batch).tolist()


def test_an_epoch_resumed_in_the_middle_gives_the_same_batches_to_the_bit() -> None:
    whole, resumed = (create_loaders(Noise(40), Noise(4), **SETTINGS, seed=2).train for _ in range(2))
    set_epoch(whole, 4)
    rest = list(whole)[2:]
    set_epoch(resumed, 4, start_batch=2)
    torch.rand(7)  # the global generator is elsewhere, as it is in another process
    again = list(resumed)
    assert len(again) == len(rest) == 3
    for (images, target), (images_again, target_again) in zip(rest, again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(target, target_again)


def test_a_reproducible_epoch_does_not_move_the_global_generators() -> None:
    loaders = create_loaders(Noise(20), Noise(4), **SETTINGS)
    before = rng_states()
    for loader in loaders:
        list(loader)
    assert rng_states() == before


def test_without_reproducibility_the_global_generator_decides_the_augmentation() -> None:
    loader = create_loaders(Noise(8), Noise(4), **SETTINGS, reproducible=False).train
    torch.manual_seed(1)
    first, second = (next(iter(loader))[0] for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(next(iter(loader))[0], first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("world_size", [1, 3, 15])  # of 15 ranks two have no image to count
def test_validation_counts_every_image_exactly_once_over_all_ranks(world_size: int, resident: bool) -> None:
    seen, ranks = [], {"world_size": world_size, "resident": resident}
    for rank in range(world_size):
        val = create_loaders(Noise(4), Noise(13), **SETTINGS, rank=rank, **ranks).val
        seen += [int(index) for _, target in val for index in target]
    assert sorted(seen) == list(range(13))


def test_resident_images_are_the_crops_and_flips_of_the_transform() -> None:
    train = Noise(6)
    loader = create_loaders(train, Noise(4), **SETTINGS, resident=True).train
    unit = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # keeps the 8-bit values
    exact = create_loaders(train, Noise(4), **(SETTINGS | unit), resident=True).train
    padded = [TF.pad(torch.from_numpy(image).permute(2, 0, 1), 4) for image in train.images]
    mirrored = 0
    for epoch in range(20):
        set_epoch(exact, epoch)
        for images, target in exact:
            for image, index in zip(images.round().byte(), target.tolist(), strict=True):
                windows = padded[index].unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4)  # (9, 9, 3, 32, 32)
                straight = (windows == image).flatten(2).all(2).any()
                flipped = (windows == image.flip(2)).flatten(2).all(2).any()
                assert straight ^ flipped
                mirrored += int(flipped)
    assert 40 < mirrored < 80  # of 120
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    set_epoch(loader, 19)
    torch.testing.assert_close(next(iter(loader))[0], (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


def test_resident_and_read_validation_images_are_the_same() -> None:
    read, resident = (create_loaders(Noise(4), Noise(13), **SETTINGS, resident=on).val for on in (False, True))
    assert len(read) == len(resident) == 2
    for (images, target), (again, target_again) in zip(read, resident, strict=True):
        torch.testing.assert_close(images, again)
        assert torch.equal(target, target_again)


def test_a_resident_epoch_resumes_repeats_and_splits_into_ranks_to_the_bit() -> None:
    def batches(epoch: int, start: int = 0, period: int = 0, **ranks: int) -> list[torch.Tensor]:
        settings = SETTINGS | {"batch_size": 4}
        loader = create_loaders(
            Noise(24), Noise(4), **settings, seed=2, resident=True, augmentation_epochs=period, shuffle=False, **ranks
        ).train
        set_epoch(loader, epoch, start_batch=start)
        return [images for images, _ in loader]

    whole = batches(3)
    assert torch.equal(torch.cat(batches(3, start=2)), torch.cat(whole[2:]))
    assert torch.equal(torch.cat(batches(5, period=2)), torch.cat(batches(1)))
    assert not torch.equal(torch.cat(batches(4)), torch.cat(whole))
    ranks = [torch.cat(batches(3, rank=rank, world_size=2)) for rank in range(2)]
    assert torch.equal(torch.stack(ranks, dim=1).flatten(0, 1), torch.cat(whole))


def test_the_built_in_digits_go_through_the_loaders() -> None:
    data = create_datasets("digits")
    settings = SETTINGS | {"augmentation": "digits", "batch_size": 64}
    loaders = create_loaders(data.train, data.val, **settings, val_batch_size=100)
    images, target = next(iter(loaders.train))
    assert images.shape == (64, 3, 32, 32) and target.max() < data.num_classes
    assert len(loaders.train) == 19 and len(loaders.val) == 6


def test_cifar_training_images_are_crops_of_the_padded_image_half_of_them_flipped() -> None:
    image = Image.fromarray(Noise(1).images[0])
    padded = TF.pad(TF.pil_to_tensor(image), 4)
    crops = [TF.crop(padded, top, left, 32, 32) for top, left in product(range(9), range(9))]
    train, val = build_transforms("cifar", (3, 32, 32))
    straight = {crop.numpy().tobytes() for crop in crops}
    flipped = {crop.flip(2).numpy().tobytes() for crop in crops}
    drawn = [train(image).numpy().tobytes() for _ in range(400)]
    assert set(drawn) <= straight | flipped
    assert 0.4 < sum(crop in flipped for crop in drawn) / 400 < 0.6
    assert len(set(drawn)) > 100
    assert torch.equal(val(image), TF.pil_to_tensor(image))


def test_digits_are_shifted_but_never_flipped() -> None:
    image = Image.fromarray(Noise(1).images[0])
    padded = TF.pad(TF.pil_to_tensor(image), 4)
    crops = {TF.crop(padded, *at, 32, 32).numpy().tobytes() for at in product(range(9), range(9))}
    train, _ = build_transforms("digits", (3, 32, 32))
    assert {train(image).numpy().tobytes() for _ in range(200)} <= crops


def test_imagenet_validation_is_a_256_pixel_side_and_a_224_pixel_centre() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    train, val = build_transforms("imagenet", (3, 224, 224))
    expected = T.Compose([T.Resize(256), T.CenterCrop(224), T.PILToTensor()])(image)
    assert torch.equal(val(image), expected)
    assert train(image).shape == (3, 224, 224)


def test_imagenet_training_takes_timms_options_and_jitters_no_colours_by_default() -> None:
    grey = Image.new("RGB", (256, 256), (100, 100, 100))
    train, _ = build_transforms("imagenet", (3, 224, 224))
    assert train(grey).unique().tolist() == [100]
    jittered, _ = build_transforms("imagenet", (3, 224, 224), color_jitter=0.4)
    assert any(jittered(grey).unique().tolist() != [100] for _ in range(5))


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_every_augmentation_brings_any_image_to_the_input_size(name: str) -> None:
    sizes, modes = ((48, 48), (50, 90), (20, 30)), ("RGB", "L")  # torchvision's MNIST is grey
    for transform, size, mode in product(build_transforms(name, (3, 48, 48)), sizes, modes):
        image = transform(Image.new(mode, size))
        assert (image.shape, image.dtype) == ((3, 48, 48), torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"augmentation": "cifr"}, r"unknown augmentation 'cifr' \(DATA.AUGMENTATION\): choose one of cifar, digits"),
        ({"timm_options": {"hflip": 0.0}}, r"'cifar' takes no options, but DATA.TIMM_OPTIONS has \['hflip'\]"),
        (
            {"augmentation": "imagenet", "timm_options": {"re_prob": 0.1}},
            r"DATA.TIMM_OPTIONS has unknown options \['re_prob'\].* takes auto_aug",
        ),
        (
            {"augmentation": "imagenet", "resident": True},
            r"'imagenet' works on single images and cannot .* \(DATA.RESIDENT\): set DATA.RESIDENT False",
        ),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_batch_size": -1}, "val_batch_size -1"),
        ({"drop_last": True, "batch_size": 64}, "20 training images do not fill one batch of 64"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_loaders(Noise(20), Noise(4), **(SETTINGS | change))


def test_a_split_without_images_is_refused() -> None:
    with pytest.raises(UserError, match="the validation split has no images"):
        create_loaders(Noise(20), Noise(0), **SETTINGS)
