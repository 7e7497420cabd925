# SPDX-License-Identifier: Apache-2.0
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from scipy.special import ndtr

from hf_lip.smoothing.exact_noise import GridNoise
from hf_lip.smoothing.noise import PhiloxStreams, noisy_copies
from hf_lip.smoothing.procedures import certify_counts


def copies(noise, image, count, *, index=0, first_draw=0, phase=1):
    rows = np.empty((count, *image.shape), dtype=np.float32)
    noise.fill(rows, noise.prepare(image), index=index, first_draw=first_draw, phase=phase)
    return rows


def law(noise):
    """P(D = j), float64, for j in -reach..reach."""
    edges = (np.arange(-noise._reach, noise._reach) + 0.5) / (noise.sigma * noise.grid)
    return np.diff(np.concatenate([[0.0], ndtr(edges), [1.0]]))


# the law


@pytest.mark.parametrize(("sigma", "grid"), [(0.25, 255), (0.05, 256), (1.0, 255)])
def test_thresholds_are_exact(sigma, grid):
    noise = GridNoise(sigma, 0, grid)
    for j in (-noise._reach, -300, -1, 0, 1, 77, noise._reach - 1):
        with mpmath.workdps(500):
            cdf = mpmath.ncdf((mpmath.mpf(j) + 0.5) / (mpmath.mpf(sigma) * grid))
            expected = [int(mpmath.floor(cdf * 2**bits)) for bits in (64, 128)]
        assert int(noise._thresholds[j + noise._reach]) == expected[0]
        assert [noise._threshold(j, bits) for bits in (64, 128)] == expected


@pytest.mark.parametrize(("sigma", "pixel"), [(0.25, 0), (0.25, 255), (1.0, 100), (0.003, 7)])
def test_frequencies_are_those_of_the_law(sigma, pixel):
    noise = GridNoise(sigma, 3)
    values = copies(noise, torch.full((40, 50), pixel / 255), 200)
    integers = np.rint(values.astype(np.float64) * 255).astype(int)
    assert np.array_equal(values, (integers.astype(np.float32) / np.float32(255)))
    expected = np.zeros(noise.highest - noise.lowest + 1)
    # clipping adds up what lies outside
    places = np.clip(pixel + np.arange(-noise._reach, noise._reach + 1), noise.lowest, noise.highest) - noise.lowest
    np.add.at(expected, places, law(noise))
    observed = np.bincount(integers.ravel() - noise.lowest, minlength=len(expected))
    usual = expected * values.size >= 5
    statistic = np.sum((observed - expected * values.size)[usual] ** 2 / (expected * values.size)[usual])
    degrees = usual.sum() - 1
    assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees) + 5
    assert observed[~usual].sum() <= 10 * max(1, expected[~usual].sum() * values.size)


def test_every_look_agrees_with_the_thresholds_as_real_numbers():
    noise = GridNoise(0.25, 0)
    exact = [Fraction(int(t), 2**64) for t in noise._thresholds]
    generator = np.random.default_rng(0)
    for word in [0, 65535, 32768, *generator.integers(0, 65536, 50)]:
        low, high = Fraction(int(word), 65536), Fraction(int(word) + 1, 65536)
        inside = [t for t in exact if low <= t < high]
        value = noise._table[word]
        assert (value == np.iinfo(np.int16).min) == bool(inside)
        if not inside:
            assert value == sum(t < low for t in exact) - noise._reach


def test_ties_are_settled_by_further_bits():
    noise = GridNoise(0.25, 0)

    class Bits:
        def __init__(self, *words):
            self.words = list(words)

        def random_raw(self):
            return self.words.pop(0)

    class Streams:
        pass

    for j in (-60, 0, 41):
        look = noise._threshold(j, 64)
        more = noise._threshold(j, 128) - (look << 64)
        for words, expected in [((more - 1,), j), ((more + 1,), j + 1), ((more, 0), j), ((more, 2**64 - 1), j + 1)]:
            streams = Streams()
            streams.bits = Bits(*words)
            assert noise._settle(look, streams) == expected
            assert not streams.bits.words


def test_a_tie_in_a_draw_is_settled_from_its_own_lane(monkeypatch):
    noise = GridNoise(0.25, 0)
    looks = []
    # every value that needed a second look is called a tie: the next thresholds are put where the looks are
    searchsorted = np.searchsorted

    def spy(thresholds, look, **options):
        place = searchsorted(thresholds, look, **options)
        if thresholds is noise._thresholds:
            looks.extend(look.tolist())
        return place

    monkeypatch.setattr(np, "searchsorted", spy)
    noise._threads.streams = PhiloxStreams()
    noise._threads.streams.select(0, 0, 1)
    before = noise._draws(1, 3072, 0)
    assert looks
    # move the threshold below the first look up to it: floor(T 2^64) == look is a tie
    value = int(searchsorted(noise._thresholds, np.uint64(looks[0])))
    noise._thresholds[value] = looks[0]
    settled = []
    monkeypatch.setattr(noise, "_settle", lambda look, streams: settled.append(look) or 123)
    after = noise._draws(1, 3072, 0)
    assert settled == [looks[0]]
    assert after[after != before].tolist() == [123]


# draws


def test_draws_do_not_depend_on_batching_and_differ_by_key():
    noise = GridNoise(0.5, 9)
    image = torch.randint(0, 256, (3, 9, 7), generator=torch.Generator().manual_seed(0)).float() / 255
    whole = copies(noise, image, 600)
    parts = [copies(noise, image, count, first_draw=first) for first, count in [(0, 1), (1, 400), (401, 199)]]
    assert np.array_equal(whole, np.concatenate(parts))
    others = [
        copies(GridNoise(0.5, 8), image, 2),
        copies(noise, image, 2, index=1),
        copies(noise, image, 2, phase=0),
        copies(noise, image, 2, first_draw=2),
        whole[:2],
    ]
    assert len({other.tobytes() for other in others}) == 5


def test_clipping_and_name():
    noise = GridNoise(1.0, 0)
    values = copies(noise, torch.tensor([0.0, 1.0]), 20_000)
    assert (noise.lowest, noise.highest) == (-6 * 255, 7 * 255)
    assert values.min() >= -6.0
    assert values.max() <= 7.0
    assert noise.name == "exact, grid 1/255, clipped to [-6, 7]"


def test_the_known_false_certificate():
    """lvm-rs.md 5.4: F = "every coordinate is a multiple of 2**-24", sigma = 0.5, votes at (1, 1) and (0, 0)."""
    sigma, n, distance = 0.5, 100_000, 2.0**0.5

    def votes(noisy):
        scaled = noisy.double() * 2.0**24
        hits = int((scaled == scaled.round()).all(dim=1).sum())
        return np.array([hits, len(noisy) - hits])

    def certificate(counts):
        return certify_counts("mono", counts, counts, sigma=sigma, alpha=0.001)

    def contradicts(here, there):
        return here.predict != there.predict and min(here.radius, there.radius) > 0.0 and here.radius > distance

    one, zero = torch.ones(2), torch.zeros(2)
    # float32 noise, added in float32: certified far beyond a point of another class
    generator = torch.Generator().manual_seed(0)
    naive = [certificate(votes(image + sigma * torch.randn(n, 2, generator=generator))) for image in (one, zero)]
    assert naive[0].radius == pytest.approx(1.9057, abs=1e-4)
    assert contradicts(*naive)
    # drawn and added in float64, rounded once: no contradiction here, though no proof either
    n = 20_000
    rounded = [
        certificate(votes(noisy_copies(image, sigma=sigma, seed=0, index=0, first_draw=0, num_draws=n)))
        for image in (one, zero)
    ]
    assert not contradicts(*rounded)
    # on the grid: the exact probabilities are known, the votes follow them and the certificates agree with them
    noise = GridNoise(sigma, 0)
    integers = np.arange(noise.lowest, noise.highest + 1)
    scaled = (integers.astype(np.float32) / np.float32(255)).astype(np.float64) * 2.0**24
    hit = scaled == np.rint(scaled)
    sound = []
    for image, pixel in ((one, 255), (zero, 0)):
        places = np.clip(pixel + np.arange(-noise._reach, noise._reach + 1), noise.lowest, noise.highest)
        p = law(noise)[hit[places - noise.lowest]].sum() ** 2
        counts = votes(torch.from_numpy(copies(noise, image, n)))
        assert counts[0] / n == pytest.approx(p, abs=4 * (p * (1 - p) / n) ** 0.5)
        sound.append(certificate(counts))
    assert sound[0].predict != sound[1].predict
    assert not contradicts(*sound)
    assert sound[0].radius < distance


# images and arguments


@pytest.mark.parametrize(("grid", "levels"), [(255, 255), (256, 16), (256, 64), (1, 1)])
def test_images_on_the_grid(grid, levels):
    image = torch.arange(levels + 1).float() / levels
    assert GridNoise(0.1, 0, grid).prepare(image).tolist() == [k * grid // levels for k in range(levels + 1)]


@pytest.mark.parametrize("value", [0.1, 256 / 255, -1 / 255, float("nan")])
def test_images_off_the_grid(value):
    with pytest.raises(ValueError, match="or certify without `sound_noise`"):
        GridNoise(0.5, 0).prepare(torch.tensor([0.0, value]))


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"sigma": 0.0}, ValueError, "sigma"),
        ({"sigma": 21.0}, ValueError, "grid"),
        ({"sigma": float("nan")}, ValueError, "sigma"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"grid": 0}, ValueError, "grid"),
        ({"grid": 255.0}, TypeError, "grid"),
    ],
)
def test_bad_arguments(arguments, error, name):
    with pytest.raises(error, match=f"`{name}`"):
        GridNoise(**{"sigma": 0.5, "seed": 0, **arguments})


def test_a_large_sigma():
    values = copies(GridNoise(5.0, 0), torch.zeros(1000), 20)
    assert values.std() == pytest.approx(5.0, rel=0.03)
