# SPDX-License-Identifier: Apache-2.0
import math

import mpmath
import numpy as np
import pytest
from scipy.special import ndtri
from scipy.stats import binom

from hf_lip.smoothing import clopper_pearson_lower, clopper_pearson_upper
from hf_lip.smoothing.intervals import (
    bernstein_lower,
    bernstein_upper,
    dataset_lower_bound,
    hoeffding_lower,
    randomized_clopper_pearson_lower,
    randomized_clopper_pearson_upper,
    uniform_of_seed,
)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (10, 0.5011872336),
        (100, 0.9332543008),
        (1000, 0.9931160484),
        (10_000, 0.9993094630),
        (100_000, 0.9999309248330094),
        (1_000_000, 0.9999930923),
    ],
)
def test_unanimous_votes_have_the_closed_form(n, expected):
    # lvm-rs.md 6.1: alpha ** (1 / n)
    lower = clopper_pearson_lower(n, n, 0.001)
    assert lower == pytest.approx(expected, abs=1e-10)
    assert 0.0 < 0.001 ** (1 / n) - lower < 1e-9


@pytest.mark.parametrize(("k", "expected"), [(90_000, 0.89703650), (60_000, 0.59520105)])
def test_bounds_of_counts(k, expected):
    assert clopper_pearson_lower(k, 100_000, 0.001) == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 7), (11, 10), (1000, 1), (1000, 500), (1000, 999), (5000, 2600)])
@pytest.mark.parametrize("alpha", [0.5, 0.05, 0.001, 1e-9])
def test_the_tail_at_the_bound_is_at_most_alpha_in_40_digits(n, k, alpha):
    lower = clopper_pearson_lower(k, n, alpha)
    with mpmath.workdps(40):
        tail = mpmath.betainc(k, n - k + 1, 0, mpmath.mpf(lower), regularized=True)
        # never above alpha, and not needlessly below it
        assert 1 - mpmath.mpf(3e-9) < tail / mpmath.mpf(alpha) <= 1


def test_the_tail_at_the_bound_for_many_samples():
    k = np.array([1, 10, 50_490, 90_000, 99_990, 99_999, 100_000])
    lower = clopper_pearson_lower(k, 100_000, 0.001)
    tail = binom.sf(k - 1, 100_000, lower)
    assert np.all(tail <= 0.001)
    assert np.all(tail >= 0.001 * (1 - 1e-8))


def test_edge_counts():
    assert clopper_pearson_lower(0, 10, 0.001) == 0.0
    assert clopper_pearson_upper(10, 10, 0.001) == 1.0
    assert clopper_pearson_lower(10, 10, 0.001) < 1.0
    assert clopper_pearson_upper(0, 10, 0.001) > 0.0
    assert clopper_pearson_lower(10**9, 10**9, 0.001) < 1.0


def test_lower_and_upper_mirror_each_other():
    n, k = 50, np.arange(51)
    total = clopper_pearson_lower(k, n, 0.01) + clopper_pearson_upper(n - k, n, 0.01)
    assert total == pytest.approx(np.ones(51), abs=1e-15)
    assert np.all(total >= 1.0)


def test_monotone_in_counts_and_level():
    k = np.arange(1001)
    lower = clopper_pearson_lower(k, 1000, 0.001)
    assert np.all(np.diff(lower) > 0)
    assert np.all(lower[1:] < k[1:] / 1000)
    assert np.all(clopper_pearson_lower(k[1:], 1000, 0.01) > lower[1:])
    # a level split over several bounds gives weaker ones
    assert np.all(clopper_pearson_lower(k[1:], 1000, 0.001 / 10) < lower[1:])


@pytest.mark.parametrize(("n", "smallest"), [(100, 66), (1000, 550), (10_000, 5156), (100_000, 50_490)])
def test_smallest_certifying_count(n, smallest):
    assert clopper_pearson_lower(smallest - 1, n, 0.001) <= 0.5 < clopper_pearson_lower(smallest, n, 0.001)


def test_scalars_and_arrays():
    assert isinstance(clopper_pearson_lower(5, 10, 0.05), float)
    assert clopper_pearson_lower(np.array([[5, 6]]), 10, 0.05).shape == (1, 2)
    assert clopper_pearson_upper([5, 6], [10, 12], 0.05).shape == (2,)


@pytest.mark.parametrize(
    ("k", "n", "alpha", "name"),
    [
        (1, 10, 0.0, "alpha"),
        (1, 10, 1.0, "alpha"),
        (1, 10, math.nan, "alpha"),
        (11, 10, 0.1, "k"),
        (-1, 10, 0.1, "k"),
        (0.5, 10, 0.1, "k"),
        (math.nan, 10, 0.1, "k"),
        (0, 0, 0.1, "n"),
        (1, 2.5, 0.1, "n"),
    ],
)
def test_bad_input(k, n, alpha, name):
    for bound in (clopper_pearson_lower, clopper_pearson_upper):
        with pytest.raises(ValueError, match=f"`{name}`"):
            bound(k, n, alpha)


def test_bounds_do_not_depend_on_their_neighbours():
    k, n = np.arange(0, 1001, 7), np.full(143, 1000)
    assert clopper_pearson_lower(k, n, 1e-9).tolist() == [clopper_pearson_lower(int(j), 1000, 1e-9) for j in k]
    levels = np.geomspace(1e-9, 0.4, 143)
    assert clopper_pearson_lower(k, n, levels).tolist() == [
        clopper_pearson_lower(int(j), 1000, level) for j, level in zip(k, levels)
    ]


# randomised Clopper-Pearson


@pytest.mark.parametrize(
    ("k", "n", "u"), [(0, 10, 0.01), (3, 10, 0.5), (9, 10, 0.9), (50, 1000, 0.25), (990, 1000, 0.0)]
)
def test_randomised_bound_solves_its_equation(k, n, u):
    lower = randomized_clopper_pearson_lower(k, n, 0.05, u)
    tail = (1 - u) * binom.sf(k, n, lower) + u * binom.sf(k - 1, n, lower)
    assert tail <= 0.05
    assert tail == pytest.approx(0.05, rel=1e-7)
    assert clopper_pearson_lower(k, n, 0.05) <= lower <= clopper_pearson_lower(k + 1, n, 0.05)


def test_randomised_bounds_fall_with_the_uniform_number_and_mirror():
    u = np.linspace(0, 0.999, 30)
    lower = randomized_clopper_pearson_lower(70, 100, 0.05, u)
    assert np.all(np.diff(lower) < 0)
    assert lower[-1] == pytest.approx(clopper_pearson_lower(70, 100, 0.05), rel=1e-3)
    upper = randomized_clopper_pearson_upper(30, 100, 0.05, u)
    assert np.all(upper >= 1 - lower)
    assert upper == pytest.approx(1 - lower, abs=1e-15)


def test_randomised_bound_of_no_votes():
    # 1 - (1 - u) (1 - p)^n = alpha, which has no positive solution for u >= alpha
    lower = randomized_clopper_pearson_lower(0, 10, 0.05, np.array([0.0, 0.02, 0.05, 0.9]))
    expected = 1 - (0.95 / (1 - np.array([0.0, 0.02]))) ** 0.1
    assert lower[:2] == pytest.approx(expected, rel=1e-6)
    assert lower[2:].tolist() == [0.0, 0.0]


def test_randomised_bound_of_unanimous_votes_is_capped():
    # lvm-rs.md 5.1: median radius 3.838 sigma at k = n = 100,000, infinite with probability alpha without a cap
    u = np.random.default_rng(0).random(4001)
    lower = randomized_clopper_pearson_lower(100_000, 100_000, 0.001, u)
    assert -ndtri(1 - np.median(lower)) == pytest.approx(3.838, abs=1e-3)
    assert lower.max() <= 0.5**1e-5 < 1
    assert randomized_clopper_pearson_lower(100_000, 100_000, 0.001, 0.0) == pytest.approx(0.5**1e-5, abs=1e-12)
    assert randomized_clopper_pearson_lower(10, 10, 0.9, 0.5) >= clopper_pearson_lower(10, 10, 0.9)


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_randomised_bound_errs_with_probability_alpha(p):
    # exactly, by summing over all votes; the plain bound errs less (lvm-rs.md 5.1: .0468 at p = .5, n = 1000)
    n, alpha = 200, 0.05
    k, u = np.arange(n + 1), (np.arange(100) + 0.5) / 100
    wrong = (randomized_clopper_pearson_lower(k[:, None], n, alpha, u) > p).mean(axis=1)
    error = float(wrong @ binom.pmf(k, n, p))
    assert error == pytest.approx(alpha, abs=5e-4)
    assert float((clopper_pearson_lower(k, n, alpha) > p) @ binom.pmf(k, n, p)) < error


def test_a_seed_has_one_uniform_number():
    assert uniform_of_seed((3, 5)) == uniform_of_seed([3, 5])
    values = [uniform_of_seed((seed, index)) for seed in range(20) for index in range(50)]
    assert len(set(values)) == 1000
    assert abs(np.mean(values) - 0.5) < 0.04
    assert 0.0 <= min(values) < max(values) < 1.0
    for seed in (-1, (0, -1)):
        with pytest.raises(ValueError, match="non-negative"):
            uniform_of_seed(seed)


def test_bad_uniform_numbers():
    for u in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="`uniform`"):
            randomized_clopper_pearson_lower(5, 10, 0.05, u)


# means of scores, lvm-rs.md 6.1


@pytest.mark.parametrize(
    ("n", "mean", "variance", "alpha", "expected"),
    [
        (100_000, 0.9, 0.01, 0.001, 0.89858969),
        (100_000, 0.9, 0.01, 0.0001, 0.89836154),
        (100_000, 0.99, 0.0009, 0.001, 0.98945276),
        (10_000, 0.9, 0.09, 0.001, 0.88652943),
        (10_000, 0.75, 0.02, 0.001, 0.74271233),
    ],
)
def test_bernstein(n, mean, variance, alpha, expected):
    assert bernstein_lower(mean, variance, n, alpha) == pytest.approx(expected, abs=6e-9)
    assert bernstein_upper(1 - mean, variance, n, alpha) == pytest.approx(1 - expected, abs=6e-9)


def test_hoeffding():
    assert hoeffding_lower(0.9, 100_000, 0.001) == pytest.approx(0.89412303, abs=6e-9)


# lvm-rs.md 5.2: m, then Clopper-Pearson, Hoeffding, Bernstein with variance 1, .25, .1, .01, 0 times m (1 - m)
RADII = {
    10_000: [
        (0.6, 0.2141, 0.2055, 0.1997, 0.2241, 0.2332, 0.2438, 0.2488),
        (0.9, 1.2287, 1.1821, 1.2083, 1.2393, 1.2510, 1.2650, 1.2715),
        (0.99, 2.2124, 1.9020, 2.1532, 2.2054, 2.2262, 2.2520, 2.2644),
        (0.999, 2.8186, 2.0624, 2.6516, 2.7075, 2.7303, 2.7592, 2.7734),
        (1.0, 3.1986, 2.0839, *[2.9158] * 5),
    ],
    100_000: [
        (0.6, 0.2409, 0.2382, 0.2373, 0.2451, 0.2479, 0.2513, 0.2529),
        (0.9, 1.2648, 1.2488, 1.2598, 1.2701, 1.2739, 1.2784, 1.2805),
        (0.99, 2.2900, 2.1475, 2.2766, 2.2977, 2.3056, 2.3152, 2.3197),
        (0.999, 3.0002, 2.4636, 2.9543, 2.9950, 3.0113, 3.0316, 3.0414),
        (0.9999, 3.4902, 2.5135, 3.3523, 3.3983, 3.4172, 3.4411, 3.4528),
        (1.0, 3.8115, 2.5194, *[3.5717] * 5),
    ],
}


@pytest.mark.parametrize("n", list(RADII))
def test_radii_of_different_bounds(n):
    for m, *expected in RADII[n]:
        lower = [clopper_pearson_lower(round(n * m), n, 0.001), hoeffding_lower(m, n, 0.001)]
        lower += [bernstein_lower(m, share * m * (1 - m), n, 0.001) for share in (1, 0.25, 0.1, 0.01, 0)]
        assert -ndtri(1 - np.array(lower)) == pytest.approx(np.array(expected), abs=6e-5)


def test_bounds_of_means_are_cut_and_below_one():
    assert bernstein_lower(0.01, 0.2, 10, 0.001) == 0.0
    assert bernstein_upper(0.99, 0.2, 10, 0.001) == 1.0
    assert hoeffding_lower(0.1, 10, 0.001) == 0.0
    assert bernstein_lower(1.0, 0.0, 10**6, 0.5) < 1.0
    # a mean of ones that rounding lifted above 1
    assert bernstein_lower(1.0 + 1e-13, 0.0, 10**4, 0.001) < 1.0


@pytest.mark.parametrize(
    ("mean", "variance", "n", "alpha", "name"),
    [
        (1.1, 0.1, 10, 0.1, "mean"),
        (math.nan, 0.1, 10, 0.1, "mean"),
        (0.5, -0.1, 10, 0.1, "variance"),
        (0.5, math.nan, 10, 0.1, "variance"),
        (0.5, 0.1, 1, 0.1, "n"),
        (0.5, 0.1, 10, 0.0, "alpha"),
    ],
)
def test_bad_moments(mean, variance, n, alpha, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        bernstein_lower(mean, variance, n, alpha)


# a list of images


def test_dataset_bound_is_the_binomial_quantile():
    # 500 images at alpha = rho = .001: more than 4 wrong certificates have probability 1.7e-4, more than 3 1.7e-3
    assert dataset_lower_bound(0.6, 500, 0.001) == pytest.approx(0.592, abs=1e-12)
    for num_images, alpha, rho in [(500, 0.001, 0.001), (10_000, 0.05, 0.001), (100, 0.01, 0.2)]:
        wrong = round((1 - dataset_lower_bound(1.0, num_images, alpha, rho)) * num_images)
        assert binom.sf(wrong, num_images, alpha) <= rho
        assert wrong == 0 or binom.sf(wrong - 1, num_images, alpha) > rho


def test_the_released_dataset_formula_is_wider_for_500_images_and_fails_for_many():
    def released(num_images, alpha, rho):
        log = math.log(1 / rho)
        return alpha + math.sqrt(alpha * (1 - alpha) * log / num_images) + log / (3 * num_images)

    # lvm-rs.md 1.4
    assert released(500, 0.001, 0.001) == pytest.approx(0.00932, abs=6e-6)
    assert 1 - dataset_lower_bound(1.0, 500, 0.001) < released(500, 0.001, 0.001)
    # more certificates than it allows are wrong with several times the stated probability
    allowed = math.floor(released(10_000, 0.05, 0.001) * 10_000)
    assert binom.sf(allowed, 10_000, 0.05) > 2.5 * 0.001


def test_dataset_bound_of_a_curve_and_bad_input():
    curve = dataset_lower_bound([0.8, 0.5, 0.003], 500, 0.001)
    assert curve == pytest.approx(np.array([0.792, 0.492, 0.0]), abs=1e-12)
    for arguments, name in [
        ((1.2, 10, 0.1, 0.1), "accuracy"),
        ((math.nan, 10, 0.1, 0.1), "accuracy"),
        ((0.5, 0, 0.1, 0.1), "num_images"),
        ((0.5, 10, 0.0, 0.1), "alpha"),
        ((0.5, 10, 0.1, 1.0), "rho"),
    ]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            dataset_lower_bound(*arguments)
