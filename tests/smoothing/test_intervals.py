# SPDX-License-Identifier: Apache-2.0
import math

import mpmath
import numpy as np
import pytest
from scipy.stats import binom

from hf_lip.smoothing import clopper_pearson_lower, clopper_pearson_upper


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
