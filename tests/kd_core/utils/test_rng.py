"""Random generators: kept, and seeded."""

import random

import numpy as np
import torch

from kd_core.utils.rng import mix_seed, mix_seed_32, preserved_rng, seed_rng


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_what_is_drawn_inside_is_not_missed_outside_even_after_an_error():
    seed_rng(5)
    expected = draw(), draw()
    seed_rng(5)
    first = draw()
    try:
        with preserved_rng():
            draw()
            raise KeyError
    except KeyError:
        pass
    assert (first, draw()) == expected


def test_a_seed_of_63_bits_starts_all_three_generators():
    seed_rng(2**62 + 1)
    drawn = draw()
    seed_rng(2**62 + 2)
    assert all(a != b for a, b in zip(drawn, draw(), strict=True))
    seed_rng(2**62 + 1)
    assert drawn == draw()


def test_mixed_seeds_are_those_of_the_first_version_so_that_its_runs_resume_to_the_bit():
    assert (mix_seed(0, 1, 2), mix_seed_32(0, 1, 2)) == (5458876493991123480, 3884055042)
    assert len({mix_seed(seed, rank, 0) for seed in range(30) for rank in range(30)}) == 900
