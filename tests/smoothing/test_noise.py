# SPDX-License-Identifier: Apache-2.0
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from hf_lip.smoothing import gaussian_noise, noisy_copies
from hf_lip.smoothing.noise import GaussianNoise, PhiloxStreams


KEY = {"seed": 3, "index": 5}


def test_noise_does_not_depend_on_batching():
    whole = gaussian_noise((2, 3), **KEY, first_draw=0, num_draws=10)
    parts = [
        gaussian_noise((2, 3), **KEY, first_draw=first, num_draws=count) for first, count in [(0, 1), (1, 6), (7, 3)]
    ]
    assert np.array_equal(whole, np.concatenate(parts))
    assert np.array_equal(whole[4], gaussian_noise((2, 3), **KEY, first_draw=4, num_draws=1)[0])


def test_every_key_and_draw_has_its_own_stream():
    draws = [
        gaussian_noise((4,), seed=seed, index=index, first_draw=draw, num_draws=1, phase=phase).tobytes()
        for seed in (0, 1)
        for index in (0, 1)
        for draw in (0, 1, 2)
        for phase in (0, 1)
    ]
    assert len(set(draws)) == len(draws)


def test_a_draw_is_the_philox_stream_that_the_module_documents():
    bits = np.random.Philox(key=np.array([3, 5], dtype=np.uint64), counter=np.array([0, 0, 7, 1], dtype=np.uint64))
    expected = np.random.Generator(bits).standard_normal((2, 3))
    assert np.array_equal(gaussian_noise((2, 3), **KEY, first_draw=7, num_draws=1, phase=1)[0], expected)


def test_draws_are_standard_normal_and_uncorrelated():
    noise = gaussian_noise((4,), **KEY, first_draw=0, num_draws=50_000)
    assert kstest(noise.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(4)).max() < 0.02
    # neighbouring draws
    assert abs(np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]) < 0.02


def test_noise_is_added_in_float64_and_rounded_once():
    image = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0))
    noisy = noisy_copies(image, sigma=0.5, **KEY, first_draw=0, num_draws=3)
    noise = gaussian_noise((1, 4, 4), **KEY, first_draw=0, num_draws=3)
    expected = (image.numpy().astype(np.float64) + 0.5 * noise).astype(np.float32)
    assert noisy.dtype == torch.float32
    assert np.array_equal(noisy.numpy(), expected)


def test_the_grid_attack_of_float32_addition_fails():
    # lvm-rs.md 5.4: with float32 addition at (1, 1), sigma 0.5, every coordinate is a multiple of 2**-24
    def fraction_on_grid(image):
        scaled = noisy_copies(image, sigma=0.5, **KEY, first_draw=0, num_draws=20_000).double() * 2.0**24
        return (scaled == scaled.round()).all(dim=1).double().mean().item()

    assert fraction_on_grid(torch.ones(2)) == pytest.approx(0.81490, abs=0.015)
    assert fraction_on_grid(torch.zeros(2)) == pytest.approx(0.27940, abs=0.015)


def test_threads_that_fill_at_once_write_the_same_copies():
    noise = GaussianNoise(0.5, 3)
    images = [torch.rand(3, 16, 16), torch.rand(2, 5)]
    expected = [noisy_copies(image, sigma=0.5, **KEY, first_draw=0, num_draws=64).numpy() for image in images]
    with ThreadPoolExecutor(4) as pool:
        rows = [np.empty((64, *image.shape), dtype=np.float32) for image in images]
        futures = [
            pool.submit(noise.fill, row[start : start + 8], noise.prepare(image), index=5, first_draw=start, phase=0)
            for start in range(0, 64, 8)
            for row, image in zip(rows, images)
        ]
        for future in futures:
            future.result()
    for row, copies in zip(rows, expected):
        assert np.array_equal(row, copies)


def test_lanes_and_blocks_are_places_of_the_draws_own_stream():
    streams = PhiloxStreams()
    streams.select(3, 5, 1)
    streams.seek(7)
    words = streams.bits.random_raw(16)
    streams.seek(7, block=2)
    assert np.array_equal(streams.bits.random_raw(8), words[8:])
    streams.seek(7, lane=1)
    assert not np.isin(streams.bits.random_raw(16), words).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_image_must_be_finite(value):
    with pytest.raises(ValueError, match="`image` has NaN or infinite"):
        noisy_copies(torch.tensor([value, 0.0]), sigma=0.5, **KEY, first_draw=0, num_draws=1)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"seed": 1.0}, TypeError, "seed"),
        ({"index": -1}, ValueError, "index"),
        ({"index": True}, TypeError, "index"),
        ({"first_draw": -1}, ValueError, "first_draw"),
    ],
)
def test_bad_input(arguments, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        gaussian_noise((2,), **{**KEY, "first_draw": 0, "num_draws": 1, **arguments})
